// The mathematics of a vocabulary whose classes are sharded; see also formula.h.
//
// A shard's sums of a row, with R_g without the 1 of its largest logit, are those of a part of the
// row, and merged as such: with M = max M_g and d_g = M - M_g
//     1 + R = sum_g (1 + R_g) exp(-d_g),      G = sum_g (G_g + A_g d_g),      A = sum_g A_g,
//     loss = G + A log1p(R),      d loss / d x_c = A / (1 + R) exp(x_c - M) - a_c.
// In double and in the order of the shards, so that whoever merges them gets the same bits. Here is
// as well how a packet is laid out, and what shards that must agree compare.
#pragma once

#include <cstring>
#include <initializer_list>

#include "formula.h"
#include "host_device.h"
#include "shard_problem.h"

namespace fused_ce {

template <class Exp>
FCE_HOST_DEVICE void merge_shard(RowSums<double>& row, double max, double rest, double gaps,
                                 double mass, const Exp& exp) {
  RowSums<double> part;
  part.max = max;
  part.rest = rest;
  part.ones = part.is_masked() ? 0.0 : 1.0;
  part.gaps = gaps;
  part.mass = mass;
  row.merge(part, exp);
}

// One shard's numbers of all rows, in the accumulation type A.
template <class A>
class Packet {
 public:
  FCE_HOST_DEVICE Packet(void* packets, int64_t rows, int64_t shard)
      : first_(static_cast<A*>(packets) + shard * kShardNumbers * (rows + kShardColumns)),
        rows_(rows) {}

  // Its elements, and how many there are from one number of a row to the next.
  FCE_HOST_DEVICE A* data() const { return first_; }
  FCE_HOST_DEVICE int64_t distance() const { return rows_ + kShardColumns; }

  FCE_HOST_DEVICE void store_facts(const ShardFacts& facts) const {
    unsigned char bytes[kElements * sizeof(A)] = {};
    std::memcpy(bytes, &facts, sizeof(facts));
    for (int i = 0; i < kElements; i++) std::memcpy(element(i), bytes + i * sizeof(A), sizeof(A));
  }

  FCE_HOST_DEVICE ShardFacts load_facts() const {
    unsigned char bytes[kElements * sizeof(A)];
    for (int i = 0; i < kElements; i++) std::memcpy(bytes + i * sizeof(A), element(i), sizeof(A));
    ShardFacts facts;
    std::memcpy(&facts, bytes, sizeof(facts));
    return facts;
  }

  // The sums of a row that has this number among all.
  template <class Exp>
  FCE_HOST_DEVICE void merge_into(RowSums<double>& sums, int64_t row, const Exp& exp) const {
    const A* numbers = first_ + row;
    const int64_t n = distance();
    merge_shard(sums, numbers[0], numbers[n], numbers[2 * n], numbers[3 * n], exp);
  }

 private:
  static constexpr int kElements = kShardNumbers * kShardColumns;

  // Of those that hold the facts.
  FCE_HOST_DEVICE A* element(int i) const {
    return first_ + i / kShardColumns * distance() + rows_ + i % kShardColumns;
  }

  A* first_;
  int64_t rows_;
};

FCE_HOST_DEVICE uint64_t mixed(uint64_t bits) {  // the finisher of MurmurHash3
  bits = (bits ^ bits >> 33) * 0xff51afd7ed558ccdULL;
  bits = (bits ^ bits >> 33) * 0xc4ceb9fe1a85ec53ULL;
  return bits ^ bits >> 33;
}

// Of numbers, one after another.
class ShardHash {
 public:
  FCE_HOST_DEVICE void add(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits_ = mixed(bits_ + 0x9e3779b97f4a7c15ULL + bits);
  }

  // In float64, as an option's are once checked.
  FCE_HOST_DEVICE void add(const Values& values) {
    add(static_cast<double>(values.count));
    const auto* numbers = static_cast<const double*>(values.data);
    for (int64_t i = 0; i < values.count; i++) add(numbers[i]);
  }

  FCE_HOST_DEVICE uint32_t value() const { return static_cast<uint32_t>(bits_ >> 32); }

 private:
  uint64_t bits_ = 0;
};

#define FCE_HASH_NUMBER(type, schema_type, name, value) hash.add(static_cast<double>(o.name));
// A shard has class weights of its own.
#define FCE_HASH_VALUES(name) \
  if (&o.name != &o.weight) hash.add(o.name);

// Of all that must be the same for every shard but the targets, as far as the host knows it.
inline ShardHash hash_of_numbers(const Problem& p, const Shards& s) {
  const Options& o = p.options;
  ShardHash hash;
  FCE_FOR_OPTIONS(FCE_NOTHING, FCE_NOTHING, FCE_HASH_NUMBER, FCE_NOTHING)
  hash.add(static_cast<double>(p.vocabulary));
  for (const bool has : {p.probabilities, s.has_weights, p.weighs_samples()})
    hash.add(has ? 1.0 : 0.0);
  return hash;
}

// The same with what lies in the memory of the input's device.
FCE_HOST_DEVICE uint32_t hash_of_options(ShardHash hash, const Options& o) {
  FCE_FOR_OPTIONS(FCE_HASH_VALUES, FCE_NOTHING, FCE_NOTHING, FCE_NOTHING)
  return hash.value();
}

#undef FCE_HASH_NUMBER
#undef FCE_HASH_VALUES

// What is added up over the rows: a sum, since the shard's memory decides on their order.
FCE_HOST_DEVICE uint64_t hash_of_target(int64_t target, int64_t row) {
  return mixed(static_cast<uint64_t>(target) + mixed(static_cast<uint64_t>(row) + 1));
}

// Whether a class of the whole vocabulary is one of this shard.
FCE_HOST_DEVICE bool has_class(const Problem& p, int64_t index) {
  return index >= p.first_class && index - p.first_class < p.classes;
}

// A target that is no class, where there may be such, has the weight 1. One shard has to count it.
FCE_HOST_DEVICE bool counts_bad_targets(const Problem& p) {
  return p.first_class == 0 && p.classes > 0;
}

}  // namespace fused_ce
