// Runs the calls that it reads from its standard input and writes what they left in memory.
//
// A call comes as the structs of problem.h, whose pointers are a buffer's number and an offset, and
// the buffers. Each buffer gets pages of its own that end, or begin, where no page can be touched,
// and its contents come back once it has been seen that nothing around it was written. What is left
// of the pages is checked; under AddressSanitizer a buffer is a block of malloc's instead, every
// byte around which is out of bounds.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../csrc/cuda/kernels.h"
#include "engine.h"

namespace {

using namespace fused_ce;

enum class Operation : int32_t { kForward, kBackward, kBackwardTarget, kScale };

// As tests/support/simulated.py packs it.
struct Call {
  int32_t call_bytes;  // sizeof(Call): that both sides mean the same
  Operation operation;
  int32_t when;
  int32_t multiprocessors, has_clusters;
  int32_t buffer_count;
  uint64_t seed;
  Problem problem;
  Elements elements;
};

struct BufferHeader {
  int64_t bytes;
  int64_t is_written;
};

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) simulator::fail("the call ends too early");
}

void write(const void* from, size_t bytes) {
  if (bytes) std::fwrite(from, bytes, 1, stdout);
}

constexpr size_t kAlignment = 16;
constexpr unsigned char kAround = 0xff;  // nan, or no index, to whoever reads it

#if defined(__SANITIZE_ADDRESS__)

class Buffer {
 public:
  Buffer(size_t bytes, bool) : data_(new unsigned char[bytes]) {}
  unsigned char* data() { return data_.get(); }
  bool is_intact() const { return true; }

 private:
  std::unique_ptr<unsigned char[]> data_;
};

#else

class Buffer {
 public:
  Buffer(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    pages_ = (rounded + page - 1) / page * page;
    const size_t all = pages_ + 2 * page;
    void* memory =
        mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) simulator::fail("no memory for a buffer of %zu bytes", bytes);
    mapping_ = {static_cast<unsigned char*>(memory), Unmap{all}};
    begin_ = mapping_.get() + page;
    mprotect(begin_, pages_, PROT_READ | PROT_WRITE);
    std::memset(begin_, kAround, pages_);
    data_ = at_end ? begin_ + pages_ - rounded : begin_;
  }
  unsigned char* data() { return data_; }
  bool is_intact() const {
    for (const unsigned char* at = begin_; at < begin_ + pages_; at++)
      if ((at < data_ || at >= data_ + bytes_) && *at != kAround) return false;
    return true;
  }

 private:
  struct Unmap {
    size_t bytes;
    void operator()(unsigned char* memory) const { munmap(memory, bytes); }
  };

  size_t bytes_, pages_;
  std::unique_ptr<unsigned char, Unmap> mapping_;
  unsigned char *begin_, *data_;
};

#endif

struct Memory {
  std::vector<BufferHeader> headers;
  std::vector<Buffer> buffers;
  std::vector<std::vector<unsigned char>> originals;

  void load(int count, bool at_end) {
    for (int i = 0; i < count; i++) {
      BufferHeader header;
      read(&header, sizeof header);
      Buffer buffer(static_cast<size_t>(header.bytes), at_end);
      read(buffer.data(), static_cast<size_t>(header.bytes));
      originals.emplace_back(buffer.data(), buffer.data() + header.bytes);
      headers.push_back(header);
      buffers.push_back(std::move(buffer));
    }
  }

  // A buffer's number, from 1 on, above an offset in bytes.
  template <class T>
  void place(T*& pointer) {
    const auto bits = reinterpret_cast<uint64_t>(pointer);
    if (bits)
      pointer = reinterpret_cast<T*>(buffers.at((bits >> 40) - 1).data() + (bits & 0xffffffffff));
  }

  void check_and_write() {
    for (size_t i = 0; i < buffers.size(); i++) {
      const size_t bytes = static_cast<size_t>(headers[i].bytes);
      if (!buffers[i].is_intact()) simulator::fail("written outside of buffer %zu", i);
      if (headers[i].is_written)
        write(buffers[i].data(), bytes);
      else if (bytes && std::memcmp(buffers[i].data(), originals[i].data(), bytes) != 0)
        simulator::fail("buffer %zu is not to be written", i);
    }
  }
};

void run(const Call& call, const Problem& p) {
  const cuda::Device device{call.multiprocessors, call.has_clusters != 0};
  switch (call.operation) {
    case Operation::kForward: {
      const size_t bytes = cuda::workspace_bytes(p, device);
      Buffer workspace(bytes, true);
      std::memset(workspace.data(), 0xcd, bytes);
      cuda::forward(p, device, workspace.data(), nullptr);
      if (!workspace.is_intact()) simulator::fail("written outside of the workspace");
      break;
    }
    case Operation::kBackward:
      return cuda::backward(p, device, static_cast<cuda::When>(call.when), nullptr);
    case Operation::kBackwardTarget:
      return cuda::backward_target(p, device, nullptr);
    case Operation::kScale:
      return cuda::scale(call.elements, p.grad_output, device, nullptr);
  }
}

}  // namespace

int main() {
  Call call;
  while (std::fread(&call, sizeof call, 1, stdin) == 1) {
    if (call.call_bytes != sizeof call)
      simulator::fail("a call has %zu bytes here, %d in Python", sizeof call, call.call_bytes);
    Memory memory;
    memory.load(call.buffer_count, call.seed % 2 == 0);
    Problem& p = call.problem;
    for (Operand* operand :
         {&p.input, &p.target, &p.grad, &p.target_grad, &p.scale_grad, &p.loss, &p.grad_output,
          &p.row_max, &p.row_rest, &p.row_mass, &p.row_mass_low, &p.options.sample_weight})
      memory.place(operand->data);
    memory.place(p.totals);
    for (Values* values : {&p.options.weight, &p.options.denominator, &p.options.logit_scale})
      memory.place(values->data);
    memory.place(call.elements.data);
    simulator::set_seed(call.seed);
    const int before = simulator::launches();
    run(call, p);
    const int32_t launches = simulator::launches() - before;
    write(&launches, sizeof launches);
    memory.check_and_write();
    std::fflush(stdout);
  }
}
