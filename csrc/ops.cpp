// Registers the CPU implementations. Schemas, fakes and autograd are in the op.py files of grit_kernels.
// The ops named ..._cuda are the GPU's kernel compiled for the host, for tests.
#include "cpu/attention_op.h"
#include "cpu/contrastive_op.h"
#include "cpu/fused_op.h"
#include "cpu/pooling_op.h"
#include "cuda/decode_host.h"
#include "signatures.h"
#include "torch_api.h"

STABLE_TORCH_LIBRARY_IMPL(grit_kernels, CPU, m) {
  GRIT_OP(m, "attention_forward", &grit::Flat<&grit::attention_forward, 3>::call);
  GRIT_OP(m, "attention_backward", &grit::Flat<&grit::attention_backward, 7>::call);
  GRIT_OP(m, "attention_decode_paged", &grit::Flat<&grit::attention_decode_paged, 5>::call);
  GRIT_OP(m, "attention_decode_cuda", &grit::Flat<&grit::attention_decode_on_host, 5>::call);
  GRIT_OP(m, "contrastive_forward", &grit::Flat<&grit::contrastive_forward, 0>::call);
  GRIT_OP(m, "contrastive_backward", &grit::Flat<&grit::contrastive_backward, 1>::call);
  GRIT_OP(m, "contrastive_step", &grit::Flat<&grit::contrastive_step, 0>::call);
  GRIT_OP(m, "contrastive_scale", &grit::contrastive_scale);
  GRIT_OP(m, "pool_forward", &grit::Flat<&grit::pool_forward, 0>::call);
  GRIT_OP(m, "rms_norm_forward", &grit::rms_norm_forward);
  GRIT_OP(m, "rms_norm_backward", &grit::rms_norm_backward);
  GRIT_OP(m, "rotary", &grit::rotary);
  GRIT_OP(m, "gated_forward", &grit::gated_forward);
  GRIT_OP(m, "gated_backward", &grit::gated_backward);
  GRIT_OP(m, "pool_backward", &grit::Flat<&grit::pool_backward, 1>::call);
  GRIT_OP(m, "attention_decode_paged_cuda", &grit::Flat<&grit::attention_decode_paged_on_host, 5>::call);
}

GRIT_EXPORT_SIGNATURES
