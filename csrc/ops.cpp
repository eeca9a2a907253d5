// Registers the CPU implementations. Schemas, fakes and autograd are in the op.py files of grit_kernels.
// attention_decode_cuda is the GPU's kernel compiled for the host, for tests.
#include "cpu/attention_op.h"
#include "cpu/contrastive_op.h"
#include "cpu/fused_op.h"
#include "cpu/pooling_op.h"
#include "cuda/decode_host.h"
#include "torch_api.h"

STABLE_TORCH_LIBRARY_IMPL(grit_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX((&grit::Flat<&grit::attention_forward, 3>::call)));
  m.impl("attention_backward", TORCH_BOX((&grit::Flat<&grit::attention_backward, 7>::call)));
  m.impl("attention_decode_cuda", TORCH_BOX((&grit::Flat<&grit::attention_decode_on_host, 5>::call)));
  m.impl("contrastive_forward", TORCH_BOX((&grit::Flat<&grit::contrastive_forward, 0>::call)));
  m.impl("contrastive_backward", TORCH_BOX((&grit::Flat<&grit::contrastive_backward, 1>::call)));
  m.impl("contrastive_step", TORCH_BOX((&grit::Flat<&grit::contrastive_step, 0>::call)));
  m.impl("contrastive_scale", TORCH_BOX(&grit::contrastive_scale));
  m.impl("pool_forward", TORCH_BOX((&grit::Flat<&grit::pool_forward, 0>::call)));
  m.impl("rms_norm_forward", TORCH_BOX(&grit::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&grit::rms_norm_backward));
  m.impl("rotary", TORCH_BOX(&grit::rotary));
  m.impl("gated_forward", TORCH_BOX(&grit::gated_forward));
  m.impl("gated_backward", TORCH_BOX(&grit::gated_backward));
  m.impl("pool_backward", TORCH_BOX((&grit::Flat<&grit::pool_backward, 1>::call)));
}
