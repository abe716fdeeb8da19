// The rows of a tile side by side, a class after another, of one operand.
//
// Where they lie like that in memory they are used where they lie. Rows of few adjacent classes are
// turned over in the cache; all others are moved class by class. There are as many lanes as whole
// vectors have, those beyond the rows with anything in them: the few that a loop would take one by
// one might be rounded otherwise, and a row's bits depend on how many come with it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rows/tiles.h"
#include "../vector/scratch.h"
#include "../vector/span.h"
#include "../vector/transpose.h"

namespace fused_ce::cpu {

// Lane l of class c + j is data[j * stride + l].
template <class T>
struct LaneClasses {
  T* data;
  int64_t stride;
};

constexpr int64_t kLaneVector = 16;  // of the widest vectors, in float

inline int64_t whole_vectors(int64_t lanes) {
  return (lanes + kLaneVector - 1) / kLaneVector * kLaneVector;
}

template <class A>
class Lanes {
 public:
  // For at most `block` classes at a time.
  Lanes(const Problem& p, const Tiling& tiling, const Operand& operand, int64_t block)
      : operand_(operand),
        classes_(p.classes),
        direct_(is_direct<A>(operand, operand.row_strides[p.row_dims - 1]) &&
                is_one_run(p, tiling, operand)),
        turns_(!direct_ && operand.class_stride == 1 && p.classes <= block),
        stride_(tiling.tile_rows + kPad),
        buffer_(operand.data ? std::min(block, p.classes) * stride_ : 0),
        rows_(operand.data && turns_ && !is_direct<A>(operand, 1) ? p.classes * tiling.tile_rows
                                                                  : 0) {
    if (!buffer_.empty()) std::fill_n(buffer_.data(), std::min(block, p.classes) * stride_, A(0));
  }

  void begin(const Tile& tile) {
    runs_ = tile.runs(operand_);
    size_ = tile.rows;
    is_in_place_ = direct_ && size_ % kLaneVector == 0;
  }

  // The classes [c, c + count).
  LaneClasses<const A> read(int64_t c, int64_t count) const {
    if (is_in_place_) return {place(c).data, operand_.class_stride};
    if (turns_)
      load_rows();
    else
      for (int64_t j = 0; j < count; j++)
        load_runs(operand_, runs_of(c + j), buffer_.data() + j * stride_);
    return {buffer_.data(), stride_};
  }

  // Where they are to be written, for store() to take them to the operand.
  LaneClasses<A> place(int64_t c) const {
    if (!is_in_place_) return {buffer_.data(), stride_};
    return {static_cast<A*>(operand_.data) + runs_of(c).first, operand_.class_stride};
  }

  void store(int64_t c, int64_t count) const {
    if (is_in_place_) return;
    if (turns_) return store_rows();
    for (int64_t j = 0; j < count; j++)
      store_runs(buffer_.data() + j * stride_, operand_, runs_of(c + j));
  }

  // Of the lanes that come after these.
  void prefetch_next(int64_t c, int64_t count) const {
    if (runs_.count > 1) return;  // for short runs it gains nothing
    if (runs_.stride == 1)
      for (int64_t j = c; j < c + count; j++) prefetch(operand_, runs_of(j).first + size_, size_);
    else if (runs_.stride == classes_ && operand_.class_stride == 1)
      prefetch(operand_, runs_.first + size_ * classes_ + c * size_, count * size_);
  }

 private:
  // Lanes between the classes: at a distance of a power of two their cache lines would compete for
  // the same few places.
  static constexpr int64_t kPad = 16;

  Runs runs_of(int64_t c) const { return runs_.moved(c * operand_.class_stride); }

  void load_rows() const {
    if (is_direct<A>(operand_, 1)) {
      runs_.for_each([&](int64_t lane, int64_t offset) {
        transpose(static_cast<const A*>(operand_.data) + offset, runs_.stride, runs_.length,
                  classes_, buffer_.data() + lane, stride_);
      });
    } else {
      for_row_runs([&](int64_t row, int64_t offset, int64_t count) {
        load_span(operand_, offset, 1, count, rows_.data() + row * classes_);
      });
      transpose(rows_.data(), classes_, size_, classes_, buffer_.data(), stride_);
    }
  }

  void store_rows() const {
    if (is_direct<A>(operand_, 1)) {
      runs_.for_each([&](int64_t lane, int64_t offset) {
        transpose(buffer_.data() + lane, stride_, classes_, runs_.length,
                  static_cast<A*>(operand_.data) + offset, runs_.stride);
      });
    } else {
      transpose(buffer_.data(), stride_, classes_, size_, rows_.data(), classes_);
      for_row_runs([&](int64_t row, int64_t offset, int64_t count) {
        store_span(rows_.data() + row * classes_, count, operand_, offset, 1);
      });
    }
  }

  // Calls use(row, offset, count) for `count` adjacent elements: of a whole run of rows from this
  // one on, or row by row.
  template <class Use>
  void for_row_runs(const Use& use) const {
    runs_.for_each([&](int64_t first, int64_t offset) {
      if (runs_.stride == classes_) return use(first, offset, runs_.length * classes_);
      for (int64_t row = 0; row < runs_.length; row++)
        use(first + row, offset + row * runs_.stride, classes_);
    });
  }

  const Operand& operand_;
  const int64_t classes_;
  const bool direct_, turns_;
  const int64_t stride_;
  const Scratch<A> buffer_, rows_;
  Runs runs_{};
  int64_t size_ = 0;
  bool is_in_place_ = false;
};

}  // namespace fused_ce::cpu
