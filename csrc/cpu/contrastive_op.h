#pragma once

#include <tuple>

#include "../torch_api.h"

namespace grit {

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_forward(Tensor queries, Tensor passages, Tensor temperature, Tensor targets,
                                                               std::optional<Tensor> query_ids, std::optional<Tensor> passage_ids,
                                                               bool in_batch_negatives, bool normalize);

std::tuple<Tensor, Tensor> contrastive_backward(Tensor grad_losses, Tensor queries, Tensor passages, Tensor temperature,
                                                Tensor targets, std::optional<Tensor> query_ids,
                                                std::optional<Tensor> passage_ids, Tensor losses, Tensor positive,
                                                bool in_batch_negatives, bool normalize);

}  // namespace grit
