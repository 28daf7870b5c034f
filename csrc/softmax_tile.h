// The elementwise passes over a tile of Q-values.
//
// Tiles are transposed, [vocabulary rows, token lanes]: a vector holds one vocabulary entry for several tokens, so that
// the maximum and the sum over the vocabulary need no reduction within a vector.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace tbrm {

using Vec = at::vec::Vectorized<float>;

// Lanes are handled in strips of this many, which is a whole number of vectors of every type on every instruction set.
constexpr int64_t kStrip = 32;
constexpr int kVectors = kStrip / Vec::size();

// How products become Q: cap(logit_scale * (product + bias)) / temperature, where cap(x) = softcap tanh(x / softcap).
// One value per lane, since tokens may have been sampled at different temperatures.
struct Scaling {
  std::vector<float> inner;  // logit_scale / softcap, or logit_scale / temperature where there is no softcap
  std::vector<float> outer;  // softcap / temperature
  bool capped;
};

// exp for values that are rounded to P next: where that is bfloat16, an error of 20 ulp of float32 does not show.
template <typename P>
inline Vec exp_for(const Vec& x) {
  if constexpr (std::is_same_v<P, float>) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
}

inline void store_as(float* out, const Vec (&x)[kVectors]) {
  for (int j = 0; j < kVectors; ++j) x[j].store(out + j * Vec::size());
}

inline void store_as(c10::BFloat16* out, const Vec (&x)[kVectors]) {
  for (int j = 0; j < kVectors; j += 2) {
    at::vec::convert_from_float<c10::BFloat16>(x[j], x[j + 1]).store(out + j * Vec::size());
  }
}

inline void load_as(const float* in, Vec (&x)[kVectors]) {
  for (int j = 0; j < kVectors; ++j) x[j] = Vec::loadu(in + j * Vec::size());
}

inline void load_as(const c10::BFloat16* in, Vec (&x)[kVectors]) {
  for (int j = 0; j < kVectors; j += 2) {
    std::tie(x[j], x[j + 1]) =
        at::vec::convert_to_float<c10::BFloat16>(at::vec::Vectorized<c10::BFloat16>::loadu(in + j * Vec::size()));
  }
}

// Turns the products of a strip into Q in place, and takes the maximum of each lane. The maximum is finite, so that
// lanes that a bias of -inf masks as a whole do not make NaN of inf - inf; a NaN stays one.
inline void scale_strip(float* tile, int64_t rows, int64_t ld, const float* bias, const Scaling& scaling, int64_t lane,
                        float* maximum) {
  Vec inner[kVectors], outer[kVectors], m[kVectors];
  load_as(scaling.inner.data() + lane, inner);
  load_as(scaling.outer.data() + lane, outer);
  for (auto& x : m) x = Vec(std::numeric_limits<float>::lowest());
  for (int64_t v = 0; v < rows; ++v) {
    float* row = tile + v * ld;
    const Vec b(bias ? bias[v] : 0.0f);
    for (int j = 0; j < kVectors; ++j) {
      Vec q = (Vec::loadu(row + j * Vec::size()) + b) * inner[j];
      if (scaling.capped) q = q.tanh() * outer[j];
      q.store(row + j * Vec::size());
      m[j] = at::vec::maximum(m[j], q);
    }
  }
  store_as(maximum, m);
}

// Per lane, over the rows: sum of e^(Q - max) and, on request, sum of e^(Q - max) (max - Q). Keeps e^(Q - max) if
// `exps` is given.
template <typename P, bool kEntropy>
inline void exp_strip(const float* tile, int64_t rows, int64_t ld, const float* maximum, P* exps, int64_t ld_exps,
                      float* sum, float* weighted) {
  Vec m[kVectors], s[kVectors], u[kVectors], e[kVectors];
  load_as(maximum, m);
  for (int j = 0; j < kVectors; ++j) s[j] = u[j] = Vec(0.0f);
  for (int64_t v = 0; v < rows; ++v) {
    for (int j = 0; j < kVectors; ++j) {
      const Vec x = Vec::loadu(tile + v * ld + j * Vec::size()) - m[j];
      e[j] = exp_for<P>(x);
      s[j] = s[j] + e[j];
      // e^-1e4 is 0: the bound only keeps infinities out of the product.
      if constexpr (kEntropy) u[j] = u[j] - e[j] * at::vec::maximum(x, Vec(-1e4f));
    }
    if (exps) store_as(exps + v * ld_exps, e);
  }
  store_as(sum, s);
  if constexpr (kEntropy) store_as(weighted, u);
}

// What turns e^(Q - max) of a block into the loss's derivative with respect to the products; one value per lane.
struct LaneGradients {
  const float* probability;     // p / e^(Q - max)
  const float* p_factor;        // of p
  const float* entropy_factor;  // of -p log p, nullptr if there is none
  const float* maximum;         // of the block
  const float* outer;           // of the scaling, nullptr if nothing is capped
};

// exps becomes p (p_factor - entropy_factor log p) (1 - tanh^2), in place.
template <typename P>
inline void gradient_strip(P* exps, int64_t rows, int64_t ld, const LaneGradients& lanes) {
  Vec probability[kVectors], p_factor[kVectors], e[kVectors];
  load_as(lanes.probability, probability);
  load_as(lanes.p_factor, p_factor);
  if (!lanes.entropy_factor && !lanes.outer) {
    for (int j = 0; j < kVectors; ++j) p_factor[j] = p_factor[j] * probability[j];
    for (int64_t v = 0; v < rows; ++v) {
      load_as(exps + v * ld, e);
      for (int j = 0; j < kVectors; ++j) e[j] = e[j] * p_factor[j];
      store_as(exps + v * ld, e);
    }
    return;
  }
  Vec entropy_factor[kVectors], maximum[kVectors], log_probability[kVectors], per_cap[kVectors];
  load_as(lanes.maximum, maximum);
  const Vec one(1.0f), floor(-1e4f);
  for (int j = 0; j < kVectors; ++j) {
    entropy_factor[j] = lanes.entropy_factor ? Vec::loadu(lanes.entropy_factor + j * Vec::size()) : Vec(0.0f);
    log_probability[j] = probability[j].log();
    per_cap[j] = lanes.outer ? one / Vec::loadu(lanes.outer + j * Vec::size()) : one;
  }
  for (int64_t v = 0; v < rows; ++v) {
    load_as(exps + v * ld, e);
    for (int j = 0; j < kVectors; ++j) {
      const Vec log_e = e[j].log();
      const Vec log_p = at::vec::maximum(log_e + log_probability[j], floor);
      Vec gradient = e[j] * probability[j] * (p_factor[j] - entropy_factor[j] * log_p);
      if (lanes.outer) {
        const Vec t = at::vec::maximum((log_e + maximum[j]) * per_cap[j], Vec(-1.0f));
        gradient = gradient * (one - t * t);
      }
      e[j] = gradient;
    }
    store_as(exps + v * ld, e);
  }
}

}  // namespace tbrm
