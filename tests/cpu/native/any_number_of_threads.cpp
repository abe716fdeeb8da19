// Makes every call with one thread and with three, whose results must be the same.
//
// ThreadSanitizer, which this is compiled with, ends the program where two threads touch the same
// memory in an order that nothing decides, whether the results show it or not.
#include <cstdio>

#include "calls.h"

int main() {
  int made = 0;
  for (const calls::Kind& kind : calls::kinds()) {
    calls::threads = 1;
    calls::Call call(kind);
    const auto expected = call.run();
    calls::threads = 3;
    if (call.run() != expected) {
      std::fprintf(stderr, "%s: another number of threads, another result\n", kind.name.c_str());
      return 1;
    }
    made++;
  }
  std::printf("%d calls\n", made);
}
