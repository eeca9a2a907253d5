// attention_decode_cuda and attention_decode_paged_cuda on the CPU: the templates of the GPU's kernel, a lane after the other, so
// that tests need no GPU. No call of the package comes here.
#include "decode_host.h"

#include <memory>

#include "decode_call.h"

namespace grit {
namespace {

constexpr int64_t PROCESSORS = 8;  // so that long keys are split

std::tuple<Tensor, Tensor> run(const DecodeCall& call) {
  const DecodeArguments& a = call.arguments;
  with_templates(call, [&](auto type, auto dim, auto pairs) {
    using T = decltype(type);
    using Block = Decode<HostWarp, T, decltype(dim)::value, decltype(pairs)::value>;
    const auto shared = std::make_unique<typename Block::Shared>();
    for (int64_t sample = 0; sample < a.samples; ++sample)
      for (int64_t head_kv = 0; head_kv < call.heads_kv; ++head_kv)
        for (int64_t block = 0; block < a.splits * call.tiles; ++block) {
          const auto tile = Block::tile_of(a, (int32_t)block, head_kv, sample);
          for (int warp = 0; warp < WARPS; ++warp) Block::read_keys(a, tile, warp, *shared);
          for (int thread = 0; thread < THREADS; ++thread) Block::finish(a, tile, thread, *shared);
        }
    if (a.splits > 1)
      for (int64_t sample = 0; sample < a.samples; ++sample)
        for (int64_t place = 0; place < a.most_rows * a.heads; ++place)
          for (int64_t column = 0; column < a.dim; ++column)
            merge_column<T>(a, sample, place / a.heads, place % a.heads, column);
  });
  return {call.out, call.lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode_on_host(const AttentionProblem& problem, Tensor q, Tensor k, Tensor v,
                                                    std::optional<Tensor> used, std::optional<Tensor> sinks) {
  return run(take_decode_apart(problem, q, k, v, used, std::nullopt, sinks, PROCESSORS));
}

std::tuple<Tensor, Tensor> attention_decode_paged_on_host(const AttentionProblem& problem, Tensor q, Tensor k_cache, Tensor v_cache,
                                                          Tensor block_table, std::optional<Tensor> sinks) {
  return run(take_decode_apart(problem, q, k_cache, v_cache, std::nullopt, block_table, sinks, PROCESSORS));
}

}  // namespace grit
