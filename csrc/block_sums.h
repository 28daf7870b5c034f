// What the forward pass keeps per block of vocabulary rows and token, and how it becomes the statistics of each token.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "product.h"
#include "softmax_tile.h"

namespace tbrm {

struct BlockSums {
  at::Tensor maximum, sum, weighted;  // [blocks, lanes]

  BlockSums(int64_t blocks, int64_t lanes, bool entropy)
      : maximum(at::empty({blocks, lanes}, at::kFloat)),
        sum(at::empty({blocks, lanes}, at::kFloat)),
        weighted(at::empty({entropy ? blocks : 0, lanes}, at::kFloat)) {}

  // Over all blocks: the maximum, log sum e^(Q - max) and the entropy of each of T tokens.
  void combine(int64_t T, float* max_out, float* log_sum_out, float* entropy_out) const {
    const int64_t blocks = maximum.size(0), lanes = maximum.size(1);
    const float *m = maximum.const_data_ptr<float>(), *s = sum.const_data_ptr<float>();
    const float* u = entropy_out ? weighted.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, divup(T, Vec::size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * Vec::size(); t < std::min(T, end * Vec::size()); t += Vec::size()) {
        Vec top = Vec::loadu(m + t);
        for (int64_t b = 1; b < blocks; ++b) top = at::vec::maximum(top, Vec::loadu(m + b * lanes + t));
        Vec total(0.0f), weighted_total(0.0f);
        for (int64_t b = 0; b < blocks; ++b) {
          const Vec shift = Vec::loadu(m + b * lanes + t) - top, in_block = Vec::loadu(s + b * lanes + t);
          const Vec rescale = shift.exp();
          total = total + in_block * rescale;
          if (u) {
            const Vec bounded = at::vec::maximum(shift, Vec(-1e4f));
            weighted_total = weighted_total + (Vec::loadu(u + b * lanes + t) - in_block * bounded) * rescale;
          }
        }
        const int count = static_cast<int>(std::min<int64_t>(Vec::size(), T - t));
        const Vec log_sum = total.log();
        top.store(max_out + t, count);
        log_sum.store(log_sum_out + t, count);
        if (u) (log_sum + weighted_total / total).store(entropy_out + t, count);
      }
    });
  }
};

}  // namespace tbrm
