#pragma once

#include <tuple>

#include "../torch_api.h"

namespace grit {

// (losses, top, log_total, excess, best)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_forward(Tensor queries, Tensor passages, Tensor temperature, Tensor targets,
                                                               std::optional<Tensor> query_ids, std::optional<Tensor> passage_ids,
                                                               bool in_batch_negatives, bool normalize);

std::tuple<Tensor, Tensor> contrastive_backward(Tensor grad_losses, Tensor queries, Tensor passages, Tensor temperature,
                                                Tensor targets, std::optional<Tensor> query_ids,
                                                std::optional<Tensor> passage_ids, Tensor top, Tensor log_total,
                                                bool in_batch_negatives, bool normalize);

// (loss, best, grad_queries, grad_passages, grad_temperature) of loss = sum_i coefficients_i loss_i; gradients in FP32
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_step(Tensor queries, Tensor passages, Tensor temperature,
                                                                    Tensor targets, std::optional<Tensor> query_ids,
                                                                    std::optional<Tensor> passage_ids, Tensor coefficients,
                                                                    bool in_batch_negatives, bool normalize);

// the gradients times grad_loss, those of queries and passages in their dtype
std::tuple<Tensor, Tensor, Tensor> contrastive_scale(Tensor grad_loss, Tensor queries, Tensor passages, Tensor grad_queries,
                                                     Tensor grad_passages, Tensor grad_temperature);

}  // namespace grit
