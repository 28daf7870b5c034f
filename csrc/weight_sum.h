// Where the weight's gradient is summed over chunks: in float32 always.
//
// A 16-bit gradient would need a float32 sum beside it. Its own memory holds the upper halves of that sum instead, bit
// for bit, and a second plane the lower ones; the last chunk puts the rounded sum in place of the upper halves.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

namespace tbrm {

class WeightSum {
 public:
  // gradient [V, D]; low_halves [V, D] of 16 bits, which a 16-bit gradient needs unless it is both fresh and last.
  // fresh: both are uninitialised. last: nothing is added after this.
  WeightSum(const at::Tensor& gradient, const std::optional<at::Tensor>& low_halves, bool fresh, bool last)
      : type_(gradient.scalar_type()),
        width_(gradient.size(1)),
        fresh_(fresh),
        last_(last),
        data_(gradient.mutable_data_ptr()),
        low_(low_halves ? static_cast<uint16_t*>(low_halves->mutable_data_ptr()) : nullptr) {}

  // Adds to [rows, columns] at row v0 and column d0 what `product(C, ldc, add)` writes or adds to C.
  template <typename Product>
  void add(int64_t v0, int64_t rows, int64_t d0, int64_t columns, std::vector<float>& scratch,
           const Product& product) const {
    const int64_t first = v0 * width_ + d0;
    if (type_ == at::kFloat) return product(static_cast<float*>(data_) + first, width_, !fresh_);
    scratch.resize(rows * columns);
    product(scratch.data(), columns, false);
    for (int64_t v = 0; v < rows; ++v) add_to_halves(first + v * width_, scratch.data() + v * columns, columns);
  }

 private:
  void add_to_halves(int64_t at, float* __restrict values, int64_t count) const {
    uint16_t* __restrict high = static_cast<uint16_t*>(data_) + at;
    uint16_t* __restrict low = low_ + at;
    if (!fresh_) {
      for (int64_t i = 0; i < count; ++i) values[i] += std::bit_cast<float>(uint32_t{high[i]} << 16 | low[i]);
    }
    if (!last_) {
      for (int64_t i = 0; i < count; ++i) {
        const auto bits = std::bit_cast<uint32_t>(values[i]);
        high[i] = static_cast<uint16_t>(bits >> 16);
        low[i] = static_cast<uint16_t>(bits);
      }
    } else if (type_ == at::kBFloat16) {
      at::vec::convert(values, static_cast<at::BFloat16*>(data_) + at, count);
    } else {
      at::vec::convert(values, static_cast<at::Half*>(data_) + at, count);
    }
  }

  at::ScalarType type_;
  int64_t width_;
  bool fresh_, last_;
  void* data_;
  uint16_t* low_;
};

}  // namespace tbrm
