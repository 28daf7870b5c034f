// The language-model head on the CPU: what `kernels/backends/cpu.py` calls, and documents.
//
// Letters: T tokens, V vocabulary entries, D hidden width. A block is kBlock vocabulary rows; a panel is kPanel tokens.
// The product of a block and a panel is one tile, which stays in the first-level cache while the passes of
// softmax_tile.h go over it. Work is dealt by blocks, each of which writes its own part of every output: results do not
// depend on the number of threads.
//
// This file is compiled once per instruction set, each into a library of its own of which Python loads one, so no
// symbol of the AVX-512 build can reach a processor without it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "arguments.h"
#include "block_sums.h"
#include "hidden_gradient.h"
#include "huge_pages.h"
#include "product.h"
#include "softmax_tile.h"
#include "weight_sum.h"

namespace tbrm {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kGradPanel = 256;  // columns of hidden in one product of the weight's gradient

template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr<T>() : nullptr;
}

// temperatures: [T], or nothing where all tokens have the one.
Scaling scaling_of(double logit_scale, double temperature, double softcap, const std::optional<Tensor>& temperatures,
                   int64_t T, int64_t lanes) {
  if (temperatures) check_vector("temperatures", *temperatures, T, at::kFloat);
  const float* given = pointer<float>(temperatures);
  Scaling scaling{std::vector<float>(lanes), std::vector<float>(lanes), softcap > 0};
  for (int64_t t = 0; t < lanes; ++t) {
    const double own = given && t < T ? given[t] : temperature;
    scaling.inner[t] = static_cast<float>(logit_scale / (scaling.capped ? softcap : own));
    scaling.outer[t] = scaling.capped ? static_cast<float>(softcap / own) : 1.0f;
  }
  return scaling;
}

template <typename W, typename P>
void forward(const Tensor& hidden, const Tensor& weight, const float* bias, const int64_t* targets,
             const Scaling& scaling, P* exps, const BlockSums& sums, bool entropy, float* target_q) {
  const int64_t T = hidden.size(0), V = weight.size(0), D = hidden.size(1), lanes = sums.maximum.size(1);
  const W* h = hidden.const_data_ptr<W>();
  const int64_t ld_h = hidden.stride(0);
  const PackedMatrix<P> packed(D, T, std::min(kPanel, lanes),
                               [&](int64_t d, int64_t t) { return static_cast<P>(h[t * ld_h + d]); });
  const WeightBlocks<W, P> weights(weight, packed.K());
  float *maximum = sums.maximum.mutable_data_ptr<float>(), *sum = sums.sum.mutable_data_ptr<float>();
  float* weighted = entropy ? sums.weighted.mutable_data_ptr<float>() : nullptr;

  at::parallel_for(0, divup(V, kBlock), 1, [&](int64_t begin, int64_t end) {
    std::vector<P> copy;
    alignas(64) float tile[kBlock * kPanel];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t v0 = block * kBlock, rows = std::min(kBlock, V - v0);
      const P* block_weight = weights.rows(v0, rows, copy);
      for (int64_t panel = 0; panel < packed.panels(); ++panel) {
        const int64_t t0 = panel * packed.width(), columns = std::min(packed.width(), lanes - t0),
                      at = block * lanes + t0;
        packed.multiply(block_weight, weights.ld(), rows, panel, columns, tile, kPanel, /*add=*/false);
        for (int64_t t = 0; t < columns; t += kStrip) {
          scale_strip(tile + t, rows, kPanel, bias ? bias + v0 : nullptr, scaling, t0 + t, maximum + at + t);
        }
        for (int64_t t = t0; t < std::min(T, t0 + columns); ++t) {
          const int64_t row = targets[t] - v0;
          if (row >= 0 && row < rows) target_q[t] = tile[row * kPanel + t - t0];
        }
        for (int64_t t = 0; t < columns; t += kStrip) {
          P* kept = exps ? exps + v0 * lanes + t0 + t : nullptr;
          if (entropy) {
            exp_strip<P, true>(tile + t, rows, kPanel, maximum + at + t, kept, lanes, sum + at + t, weighted + at + t);
          } else {
            exp_strip<P, false>(tile + t, rows, kPanel, maximum + at + t, kept, lanes, sum + at + t, nullptr);
          }
        }
      }
    }
    at::native::cpublas::brgemm_release(Product<P>::step > 1);
  });
}

// What the backward pass needs to know of each token, [T] each.
struct TokenGradients {
  const float *maximum, *log_sum;
  const float* p_factor;        // the factor of p_v
  const float* entropy_factor;  // the factor of -p_v log p_v, or nullptr
  const float* target_factor;   // added at the target
  const int64_t* targets;
};

template <typename P>
void backward(P* exps, const float* block_max, int64_t V, int64_t lanes, int64_t T, const TokenGradients& tokens,
              const Scaling& scaling, const PackedMatrix<P>* hidden, int64_t D,
              const std::optional<WeightSum>& grad_weight, float* grad_bias) {
  // Padding lanes: nothing flows from them.
  std::vector<float> p_factor(lanes, 0.0f), entropy_factor(lanes, 0.0f);
  std::copy(tokens.p_factor, tokens.p_factor + T, p_factor.begin());
  if (tokens.entropy_factor) std::copy(tokens.entropy_factor, tokens.entropy_factor + T, entropy_factor.begin());
  const float* outer = scaling.capped ? scaling.outer.data() : nullptr;

  at::parallel_for(0, divup(V, kBlock), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> probability(lanes, 0.0f), part;
    std::vector<std::pair<P*, P>> at_targets;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t v0 = block * kBlock, rows = std::min(kBlock, V - v0);
      const float* maximum = block_max + block * lanes;
      P* block_exps = exps + v0 * lanes;
      for (int64_t t = 0; t < T; t += Vec::size()) {
        const int count = static_cast<int>(std::min<int64_t>(Vec::size(), T - t));
        const Vec shift = Vec::loadu(maximum + t, count) - Vec::loadu(tokens.maximum + t, count);
        (shift - Vec::loadu(tokens.log_sum + t, count)).exp().store(probability.data() + t, count);
      }
      // The target's own term is added before rounding: take the exponentials before they are overwritten.
      at_targets.clear();
      for (int64_t t = 0; t < T; ++t) {
        const int64_t row = tokens.targets[t] - v0;
        if (row < 0 || row >= rows) continue;
        P* where = block_exps + row * lanes + t;
        const int64_t first = t / kStrip * kStrip;
        float exact[kStrip];
        std::copy(block_exps + row * lanes + first, block_exps + row * lanes + first + kStrip, exact);
        const LaneGradients lane{probability.data() + first, p_factor.data() + first,
                                 tokens.entropy_factor ? entropy_factor.data() + first : nullptr, maximum + first,
                                 outer ? outer + first : nullptr};
        gradient_strip(exact, 1, kStrip, lane);
        at_targets.emplace_back(where, static_cast<P>(exact[t - first] + tokens.target_factor[t]));
      }
      for (int64_t t = 0; t < lanes; t += kStrip) {
        const LaneGradients lane{probability.data() + t, p_factor.data() + t,
                                 tokens.entropy_factor ? entropy_factor.data() + t : nullptr, maximum + t,
                                 outer ? outer + t : nullptr};
        gradient_strip(block_exps + t, rows, lanes, lane);
      }
      for (const auto& [where, value] : at_targets) *where = value;

      if (grad_bias) {
        for (int64_t v = 0; v < rows; ++v) {
          float total = 0.0f;
          for (int64_t t = 0; t < T; ++t) total += static_cast<float>(block_exps[v * lanes + t]);
          grad_bias[v0 + v] += total;
        }
      }
      for (int64_t panel = 0; grad_weight && panel < hidden->panels(); ++panel) {
        const int64_t d0 = panel * hidden->width(), columns = std::min(hidden->width(), D - d0);
        grad_weight->add(v0, rows, d0, columns, part, [&](float* C, int64_t ldc, bool add) {
          hidden->multiply(block_exps, lanes, rows, panel, columns, C, ldc, add);
        });
      }
    }
    at::native::cpublas::brgemm_release(Product<P>::step > 1);
  });
}

// -> target Q, max, log sum e^(Q - max), entropy (empty unless wanted), [T] each, and the blocks' maxima [V / kBlock,
// T].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_forward(const Tensor& hidden, const Tensor& weight,
                                                                const std::optional<Tensor>& bias,
                                                                const Tensor& targets, double logit_scale,
                                                                double temperature, double softcap, bool entropy,
                                                                bool bfloat16_products,
                                                                const std::optional<Tensor>& exps,
                                                                const std::optional<Tensor>& temperatures) {
  check_operands(hidden, weight);
  const int64_t T = hidden.size(0), V = weight.size(0), lanes = divup(T, kStrip) * kStrip;
  check_vector("targets", targets, T, at::kLong);
  if (bias) check_vector("bias", *bias, V, at::kFloat);
  if (exps) check_scratch(*exps, V, T);

  const Scaling scaling = scaling_of(logit_scale, temperature, softcap, temperatures, T, lanes);
  const auto options = hidden.options().dtype(at::kFloat);
  Tensor target_q = at::zeros({T}, options), maximum = at::empty({T}, options), log_sum = at::empty({T}, options);
  Tensor entropies = at::empty({entropy ? T : 0}, options);
  const BlockSums sums(divup(V, kBlock), lanes, entropy);
  dispatch_weight(weight, [&](auto element) {
    using W = decltype(element);
    const auto run = [&](auto product) {
      using P = decltype(product);
      forward<W, P>(hidden, weight, pointer<float>(bias), targets.const_data_ptr<int64_t>(), scaling, pointer<P>(exps),
                    sums, entropy, target_q.mutable_data_ptr<float>());
    };
    if constexpr (std::is_same_v<W, at::BFloat16>) {
      if (bfloat16_products) return run(at::BFloat16{});
    }
    run(float{});
  });
  sums.combine(T, maximum.mutable_data_ptr<float>(), log_sum.mutable_data_ptr<float>(),
               entropy ? entropies.mutable_data_ptr<float>() : nullptr);
  return {target_q, maximum, log_sum, entropies, sums.maximum};
}

// exps becomes the loss's derivative with respect to hidden @ weight.T, transposed; adds to the weight's and bias's
// gradients.
void head_backward(Tensor& exps, const Tensor& block_max, const Tensor& targets, const Tensor& maximum,
                   const Tensor& log_sum, const Tensor& p_factor, const std::optional<Tensor>& entropy_factor,
                   const Tensor& target_factor, double logit_scale, double temperature, double softcap,
                   const Tensor& hidden, const std::optional<Tensor>& grad_weight,
                   const std::optional<Tensor>& low_halves, bool fresh, bool last,
                   const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& temperatures) {
  const int64_t T = hidden.size(0), D = hidden.size(1), V = exps.size(0), lanes = exps.size(1);
  check_scratch(exps, V, T);
  check_operands(hidden, hidden);
  TORCH_CHECK(block_max.is_contiguous() && block_max.size(0) == divup(V, kBlock) && block_max.size(1) == lanes,
              "tbrm_kernels: block_max");
  check_vector("targets", targets, T, at::kLong);
  for (const auto& [name, tensor] :
       {std::pair{"maximum", maximum}, {"log_sum", log_sum}, {"p_factor", p_factor}, {"target_factor", target_factor}}) {
    check_vector(name, tensor, T, at::kFloat);
  }
  if (entropy_factor) check_vector("entropy_factor", *entropy_factor, T, at::kFloat);
  if (grad_bias) check_vector("grad_bias", *grad_bias, V, at::kFloat);
  std::optional<WeightSum> weight_sum;
  if (grad_weight) weight_sum.emplace(checked_sum(*grad_weight, low_halves, V, D, fresh, last));

  const TokenGradients tokens{maximum.const_data_ptr<float>(),   log_sum.const_data_ptr<float>(),
                              p_factor.const_data_ptr<float>(),      pointer<float>(entropy_factor),
                              target_factor.const_data_ptr<float>(), targets.const_data_ptr<int64_t>()};
  const Scaling scaling = scaling_of(logit_scale, temperature, softcap, temperatures, T, lanes);
  dispatch_weight(hidden, [&](auto element) {
    using H = decltype(element);
    const H* h = hidden.const_data_ptr<H>();
    const int64_t ld = hidden.stride(0);
    const auto run = [&](auto product) {
      using P = decltype(product);
      std::optional<PackedMatrix<P>> packed;
      if (grad_weight) {
        packed.emplace(lanes, D, std::min(kGradPanel, D), [&](int64_t t, int64_t d) {
          return t < T ? static_cast<P>(h[t * ld + d]) : static_cast<P>(0.0f);
        });
      }
      backward<P>(exps.mutable_data_ptr<P>(), block_max.const_data_ptr<float>(), V, lanes, T, tokens, scaling,
                  packed ? &*packed : nullptr, D, weight_sum, pointer<float>(grad_bias));
    };
    if constexpr (std::is_same_v<H, at::BFloat16>) {
      if (exps.scalar_type() == at::kBFloat16) return run(at::BFloat16{});
    }
    run(float{});
  });
}

// Float32 exps as head_backward has left them, and the weight -> hidden's gradient [T, D] in float32.
Tensor head_hidden_gradient(const Tensor& exps, const Tensor& weight, int64_t T) {
  check_scratch(exps, weight.size(0), T);
  check_operands(weight, weight);
  Tensor out = at::empty({T, weight.size(1)}, exps.options());
  dispatch_weight(weight, [&](auto element) {
    hidden_gradient<decltype(element)>(exps.const_data_ptr<float>(), exps.size(1), weight,
                                       out.mutable_data_ptr<float>(), T);
  });
  return out;
}

// Rounds a 16-bit gradient of the weight to which the last chunk had nothing to add.
void round_weight(Tensor& grad_weight, const Tensor& low_halves) {
  const int64_t V = grad_weight.size(0), D = grad_weight.size(1);
  const WeightSum sum = checked_sum(grad_weight, low_halves, V, D, /*fresh=*/false, /*last=*/true);
  at::parallel_for(0, divup(V, kBlock), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> nothing;
    for (int64_t v0 = begin * kBlock; v0 < std::min(V, end * kBlock); v0 += kBlock) {
      const int64_t rows = std::min(kBlock, V - v0);
      sum.add(v0, rows, 0, D, nothing, [&](float* C, int64_t, bool) { std::fill(C, C + rows * D, 0.0f); });
    }
  });
}

}  // namespace

TORCH_LIBRARY(tbrm_kernels_cpu, m) {
  m.def(
      "head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, float temperature, "
      "float softcap, "
      "bool entropy, bool bfloat16_products, Tensor(a!)? exps, Tensor? temperatures=None) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "head_backward(Tensor(a!) exps, Tensor block_max, Tensor targets, Tensor maximum, Tensor log_sum, Tensor p_factor, "
      "Tensor? entropy_factor, Tensor target_factor, float logit_scale, float temperature, float softcap, Tensor hidden, "
      "Tensor(b!)? grad_weight, Tensor(c!)? low_halves, bool fresh, bool last, Tensor(d!)? grad_bias, "
      "Tensor? temperatures=None) -> ()");
  m.def("head_hidden_gradient(Tensor exps, Tensor weight, int T) -> Tensor");
  m.def("round_weight(Tensor(a!) grad_weight, Tensor(b!) low_halves) -> ()");
  m.impl("head_forward", c10::DispatchKey::CPU, TORCH_FN(head_forward));
  m.impl("head_hidden_gradient", c10::DispatchKey::CPU, TORCH_FN(head_hidden_gradient));
  m.impl("round_weight", c10::DispatchKey::CPU, TORCH_FN(round_weight));
  m.impl("head_backward", c10::DispatchKey::CPU, TORCH_FN(head_backward));
}

}  // namespace tbrm
