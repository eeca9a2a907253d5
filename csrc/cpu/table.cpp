// The table of one instruction set.
#include "kernels.h"

namespace grit::GRIT_ISA {

void pool_rows(const PoolRows&);

#define GRIT_STRING_(x) #x
#define GRIT_STRING(x) GRIT_STRING_(x)

extern const Kernels table;
const Kernels table = {GRIT_STRING(GRIT_ISA), pool_rows};

}  // namespace grit::GRIT_ISA
