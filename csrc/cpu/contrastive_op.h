#pragma once

#include <tuple>

#include "../problem.h"
#include "../torch_api.h"

namespace grit {

// The tensors of ContrastiveProblem in grit_kernels/contrastive/problem.py; its flags come after other arguments.
struct Pairs {
  Tensor queries, passages, temperature, targets;
  std::optional<Tensor> query_ids, passage_ids;
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>>;
};

// (losses, top, log_total, excess, best)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(const Pairs&, bool in_batch_negatives, bool normalize);

std::tuple<Tensor, Tensor> contrastive_backward(const Pairs&, Tensor grad_losses, Tensor top, Tensor log_total,
                                                bool in_batch_negatives, bool normalize);

// (loss, best, grad_queries, grad_passages, grad_temperature) of loss = sum_i coefficients_i loss_i; gradients in FP32
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_step(const Pairs&, Tensor coefficients, bool in_batch_negatives,
                                                                    bool normalize);

// the gradients times grad_loss; those of queries and passages in the dtype of their inputs
std::tuple<Tensor, Tensor, Tensor> contrastive_scale(Tensor grad_loss, Tensor queries, Tensor passages, Tensor grad_queries,
                                                     Tensor grad_passages, Tensor grad_temperature);

}  // namespace grit
