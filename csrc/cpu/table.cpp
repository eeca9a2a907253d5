// The table of one instruction set.
#include <type_traits>

#include "kernels.h"
#include "tiles.h"

namespace grit::GRIT_ISA {

std::remove_pointer_t<decltype(Kernels::pool_rows)> pool_rows;
std::remove_pointer_t<decltype(Kernels::pool_backward_rows)> pool_backward_rows;
std::remove_pointer_t<decltype(Kernels::layout)> layout;
std::remove_pointer_t<decltype(Kernels::pack_keys)> pack_keys;
std::remove_pointer_t<decltype(Kernels::forward_scratch)> forward_scratch;
std::remove_pointer_t<decltype(Kernels::forward_tile)> forward_tile;
std::remove_pointer_t<decltype(Kernels::decode_part)> decode_part;
std::remove_pointer_t<decltype(Kernels::decode_join)> decode_join;
std::remove_pointer_t<decltype(Kernels::backward_pack_keys)> backward_pack_keys;
std::remove_pointer_t<decltype(Kernels::backward_pack_queries)> backward_pack_queries;
std::remove_pointer_t<decltype(Kernels::backward_take_apart)> backward_take_apart;
std::remove_pointer_t<decltype(Kernels::backward_scratch)> backward_scratch;
std::remove_pointer_t<decltype(Kernels::backward_keys)> backward_keys;
std::remove_pointer_t<decltype(Kernels::backward_store_dq)> backward_store_dq;

extern const ContrastiveKernels contrastive_table;
extern const FusedKernels fused_table;

#define GRIT_STRING_(x) #x
#define GRIT_STRING(x) GRIT_STRING_(x)

// A set with tiles has only the kernels that multiply matrices, and only for bfloat16; another set does the rest.
#if defined(GRIT_ISA_TILES)
constexpr ThreadState THREAD = {enter_tiles, leave_tiles};
#define GRIT_NO_PRODUCT(kernel) nullptr
#else
constexpr ThreadState THREAD = {};
#define GRIT_NO_PRODUCT(kernel) kernel
#endif

extern const Kernels table;
const Kernels table = {
    GRIT_STRING(GRIT_ISA),
    THREAD,
    GRIT_NO_PRODUCT(pool_rows),
    GRIT_NO_PRODUCT(pool_backward_rows),
    GRIT_NO_PRODUCT(&fused_table),
    &contrastive_table,
    layout,
    pack_keys,
    forward_scratch,
    forward_tile,
    decode_part,
    decode_join,
    backward_pack_keys,
    backward_pack_queries,
    backward_take_apart,
    backward_scratch,
    backward_keys,
    backward_store_dq,
};

}  // namespace grit::GRIT_ISA
