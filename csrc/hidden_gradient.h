// Hidden's gradient where operands are multiplied as float32: [T, D] = derivatives[V, T]^T weight[V, D].
//
// Each thread has its own tiles of the result and goes through the vocabulary alone, kDepth rows at a time: it lays out
// what its tiles need of the operands as the product wants them, and multiplies. Waiting for the other threads at each
// step, to share that work, was a little slower, and many times slower where a core is shared with another process.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "huge_pages.h"
#include "product.h"
#include "softmax_tile.h"

namespace tbrm {

constexpr int64_t kDepth = 256;
constexpr int64_t kTileTokens = 128;
constexpr int64_t kTileWidth = 64;

// [rows, lanes], lanes a multiple of kStrip -> [lanes, rows]
inline void transpose(const float* in, int64_t ld_in, int64_t rows, int64_t lanes, float* out, int64_t ld_out) {
  constexpr int64_t kSide = 16;
  int64_t v = 0;
  for (; v + kSide <= rows; v += kSide) {
    for (int64_t t = 0; t < lanes; t += kSide) {
      at::vec::transpose_mxn<float, kSide, kSide>(in + v * ld_in + t, ld_in, out + t * ld_out + v, ld_out);
    }
  }
  for (; v < rows; ++v) {
    for (int64_t t = 0; t < lanes; ++t) out[t * ld_out + v] = in[v * ld_in + t];
  }
}

template <typename W>
void hidden_gradient(const float* derivatives, int64_t lanes, const at::Tensor& weight, float* out, int64_t T) {
  const int64_t V = weight.size(0), D = weight.size(1), ld_w = weight.stride(0);
  const W* w = weight.const_data_ptr<W>();
  const int64_t width = std::min(kTileWidth, D), down = divup(T, kTileTokens);
  at::parallel_for(0, divup(D, width) * down, 1, [&](int64_t begin, int64_t end) {
    // Tiles are numbered down the columns: those of one thread lie in these columns and tokens.
    const int64_t first = begin / down, last = (end - 1) / down;
    const int64_t d_begin = first * width, columns = std::min(D, (last + 1) * width) - d_begin;
    const int64_t t_begin = first == last ? begin % down * kTileTokens : 0;
    const int64_t t_end = first == last ? std::min(lanes, ((end - 1) % down + 1) * kTileTokens) : lanes;
    const int64_t ld = kDepth + 32;  // not a power of 2, so that rows do not share cache sets
    const Buffer<float> left = make_buffer<float>((t_end - t_begin) * ld);
    // A float32 weight is multiplied as it lies, unless its rows are whole pages apart and would share cache sets.
    const bool direct = std::is_same_v<W, float> && ld_w % 1024 != 0;
    PackedMatrix<float> copy(direct ? 0 : std::min(kDepth, V), columns, width);
    for (int64_t v0 = 0; v0 < V; v0 += kDepth) {
      const int64_t rows = std::min(kDepth, V - v0);
      transpose(derivatives + v0 * lanes + t_begin, lanes, rows, t_end - t_begin, left.get(), ld);
      if (!direct) {
        copy.pack(rows, columns,
                  [&](int64_t v, int64_t d) { return static_cast<float>(w[(v0 + v) * ld_w + d_begin + d]); });
      }
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t panel = tile / down, d0 = panel * width, t0 = tile % down * kTileTokens;
        const float* tokens = left.get() + (t0 - t_begin) * ld;
        const int64_t M = std::min(kTileTokens, T - t0), N = std::min(width, D - d0);
        float* tile_out = out + t0 * D + d0;
        if constexpr (std::is_same_v<W, float>) {
          if (direct) {
            multiply(tokens, ld, w + v0 * ld_w + d0, ld_w, M, N, rows, tile_out, D, /*add=*/v0 > 0);
            continue;
          }
        }
        copy.multiply(tokens, ld, M, panel - first, N, tile_out, D, /*add=*/v0 > 0);
      }
    }
  });
}

}  // namespace tbrm
