// Registers the CPU implementations. Schemas, fakes and autograd stand in the op.py files of grit_kernels.
#include "cpu/attention_op.h"
#include "cpu/contrastive_op.h"
#include "cpu/fused_op.h"
#include "cpu/pooling_op.h"
#include "torch_api.h"

STABLE_TORCH_LIBRARY_IMPL(grit_kernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&grit::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&grit::attention_backward));
  m.impl("contrastive_forward", TORCH_BOX(&grit::contrastive_forward));
  m.impl("contrastive_backward", TORCH_BOX(&grit::contrastive_backward));
  m.impl("contrastive_step", TORCH_BOX(&grit::contrastive_step));
  m.impl("contrastive_scale", TORCH_BOX(&grit::contrastive_scale));
  m.impl("pool_forward", TORCH_BOX(&grit::pool_forward));
  m.impl("rms_norm_forward", TORCH_BOX(&grit::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&grit::rms_norm_backward));
  m.impl("rotary", TORCH_BOX(&grit::rotary));
  m.impl("gated_forward", TORCH_BOX(&grit::gated_forward));
  m.impl("gated_backward", TORCH_BOX(&grit::gated_backward));
  m.impl("pool_backward", TORCH_BOX(&grit::pool_backward));
}
