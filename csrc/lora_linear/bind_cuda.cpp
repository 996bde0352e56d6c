// lora_linear_fwd and lora_linear_bwd for the CUDA key: what the Hopper kernels take goes to them, all else to the general
// kernels (Triton, or the reference without it), which Python registers as lora_linear_fwd_general and _bwd_general.
#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>

#include "../common/bind_cuda.h"
#include "hopper.h"
#include "lora_dy_sm90.h"
#include "lora_gemm_sm90.h"
#include "lora_x_sm90.h"
#include "plan_sm90.h"

namespace peft_kernels {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::atomic<bool> hopper_enabled{true};

constexpr int64_t kMostRank = 128;  // the passes keep a program's columns of every rank in registers
constexpr int kMostDevices = 64;

struct Chip {
  int capability = 0, sms = 0;
};

// Asked of the driver once per device; of a device that it does not answer for (none, or a fake tensor's), no chip.
Chip chip_of(const Tensor& t) {
  static std::array<std::atomic<int64_t>, kMostDevices> known{};
  const int index = t.get_device();
  if (index < 0 || index >= kMostDevices) return {};
  int64_t packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, minor = 0, sms = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index) != cudaSuccess) {
      cudaGetLastError();  // it is not the next caller's
      return {};
    }
    packed = int64_t{10 * major + minor} << 32 | sms;
    known[index].store(packed, std::memory_order_relaxed);
  }
  return {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xffffffff)};
}

// ---- what the kernels take ----

// Elements between rows; of one row any multiple of 8 would do.
int64_t pitch(const Tensor& t) { return t.size(0) == 1 ? t.size(1) : t.stride(0); }

// Rows of unit stride that 16-byte loads and TMA can address.
bool has_rows(const Tensor& t) {
  return t.stride(1) == 1 && t.size(1) % 8 == 0 && pitch(t) % 8 == 0 && pitch(t) >= t.size(1) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

bool is_adapter(const Tensor& t, at::ScalarType dtype) {
  return t.dim() == 2 && (t.scalar_type() == dtype || t.scalar_type() == at::kFloat);
}

constexpr int64_t kMostRows = int64_t{1} << 30;  // coordinates of TMA are 32-bit
constexpr const char* kUnaligned = "rows of x, dy or weight do not start on 16 bytes";
constexpr const char* kMismatch = "a size is 0 or does not fit";

// Why the Hopper kernels do not take a call, or null. `rows` is x or dy, of that many columns; the weight, where the
// call multiplies by it; dropout: whether a mask is drawn or given.
const char* refusal(const Tensor& rows, int64_t columns, const OptionalTensor& weight, const Tensor& lora_a,
                    const Tensor& lora_b, bool dropout) {
  if (!hopper_enabled.load(std::memory_order_relaxed)) return "switched off";
  const at::ScalarType dtype = rows.scalar_type();
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return "the dtype is neither bfloat16 nor float16";
  if (chip_of(rows).capability != 90) return "the GPU is not of compute capability 9.0";
  if (!is_adapter(lora_a, dtype) || !is_adapter(lora_b, dtype)) return "an adapter's dtype is neither x's nor float32";
  const at::Device device = rows.device();
  if (lora_a.device() != device || lora_b.device() != device) return "tensors lie on several devices";
  const int64_t R = lora_a.size(0), K = lora_a.size(1), N = lora_b.size(0);
  if (R % 8 != 0 || R > kMostRank || R == 0) return "the rank is no multiple of 8 up to 128";
  if (lora_b.size(1) != R || rows.dim() != 2 || rows.size(0) == 0 || K == 0 || N == 0) return kMismatch;
  if (rows.size(1) != columns) return kMismatch;
  if (rows.size(0) > kMostRows) return "there are more than 2**30 rows";
  if (K % 8 != 0 || N % 8 != 0 || !has_rows(rows)) return kUnaligned;
  if (dropout && K % 128 != 0) return "with dropout x's columns are no multiple of 128";
  if (!weight) return nullptr;
  if (weight->scalar_type() != dtype || weight->dim() != 2) return "the weight is of another dtype than x";
  if (weight->device() != device) return "tensors lie on several devices";
  if (weight->size(0) != N || weight->size(1) != K) return kMismatch;
  if (!has_rows(*weight) && !has_rows(weight->t())) return kUnaligned;
  return nullptr;
}

bool fits_forward(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold, int64_t N) {
  if (bias && (bias->dim() != 1 || bias->size(0) != N || bias->device() != x.device())) return false;
  return !seed || (seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->device() == x.device() &&
                   threshold >= 1 && threshold <= 65536);
}

// ---- products ----

// A copy where rows do not start on 16 bytes: a slice of a flat buffer may be contiguous and yet lie anywhere.
Tensor with_rows(const Tensor& t) { return has_rows(t) ? t : t.clone(at::MemoryFormat::Contiguous); }

// In x's dtype with aligned rows; as it is where it already is that.
Tensor adapter(const Tensor& t, at::ScalarType dtype) {
  return with_rows(t.to(dtype));
}

// out = p @ q + alpha * drop(low @ t) + bias, rounded once: p [M, K], q [K, N] a view of the weight, t [R, N].
void low_rank_first(Tensor& out, const Tensor& p, const Tensor& q, const Tensor& low, const Tensor& t, double alpha,
                    const OptionalTensor& bias, const unsigned char* mask) {
  LoraGemm g{};
  g.q_transposed = q.stride(0) == 1 && q.stride(1) != 1;
  const Tensor q_rows = g.q_transposed ? q.t() : q;
  const Tensor t_rows = with_rows(g.q_transposed ? t.t() : t);
  g.p = p.const_data_ptr(), g.q = q_rows.const_data_ptr(), g.low = low.const_data_ptr(), g.t = t_rows.const_data_ptr();
  g.mask = mask;
  g.bias = bias ? bias->const_data_ptr() : nullptr;
  g.bias_fp32 = bias && bias->scalar_type() == at::kFloat;
  g.c = out.mutable_data_ptr();
  g.alpha = static_cast<float>(alpha);
  g.M = p.size(0), g.N = q.size(1), g.K = p.size(1), g.R = low.size(1);
  g.ld_p = pitch(p), g.ld_q = pitch(q_rows), g.ld_low = pitch(low), g.ld_t = pitch(t_rows), g.ld_c = g.N;
  g.dtype = dtype_code(p.scalar_type());
  C10_CUDA_CHECK(static_cast<cudaError_t>(lora_gemm_sm90(&g, current_stream(p))));
}

// The same by cuBLAS, where our tiles would leave much of the last wave idle. No mask; bias in p's dtype.
void beta_one(Tensor& out, const Tensor& p, const Tensor& q, const Tensor& low, const Tensor& t, double alpha,
              const OptionalTensor& bias) {
  if (bias) {
    at::addmm_out(out, *bias, low, t, 1, alpha);
  } else {
    at::addmm_out(out, out, low, t, 0, alpha);
  }
  out.addmm_(p, q);
}

Tensor gemm(const Tensor& p, const Tensor& q, const Tensor& low, const Tensor& t, double alpha, const OptionalTensor& bias,
            const unsigned char* mask, int sms) {
  Tensor out = at::empty({p.size(0), q.size(1)}, p.options().memory_format(at::MemoryFormat::Contiguous));
  // cuBLAS could neither drop nor add a bias before it rounds.
  const bool only_ours = mask != nullptr || (bias && bias->scalar_type() != p.scalar_type());
  if (only_ours || starts_with_low_rank(p.size(0), q.size(1), p.size(1), low.size(1), sms)) {
    low_rank_first(out, p, q, low, t, alpha, bias, mask);
  } else {
    beta_one(out, p, q, low, t, alpha, bias);
  }
  return out;
}

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& lora_a,
                                           const Tensor& lora_b, const OptionalTensor& bias, const OptionalTensor& seed,
                                           double scaling, int64_t threshold) {
  if (!weight || refusal(x, lora_a.size(-1), weight, lora_a, lora_b, seed.has_value()) != nullptr ||
      !fits_forward(x, bias, seed, threshold, lora_b.size(0))) {
    static const auto general = general_op<decltype(forward)>("peft_kernels::lora_linear_fwd_general");
    return general.call(x, weight, lora_a, lora_b, bias, seed, scaling, threshold);
  }
  const BelowAutogradAndAutocast below;
  const c10::cuda::CUDAGuard guard(x.device());
  const int sms = chip_of(x).sms;
  const Tensor a = adapter(lora_a, x.scalar_type()), b = adapter(lora_b, x.scalar_type());
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0);
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor s = at::empty({M, R}, options);
  Tensor mask = at::empty(seed ? at::IntArrayRef{M, (K + 7) / 8} : at::IntArrayRef{0}, options.dtype(at::kByte));

  LoraDown d{};
  d.x = x.const_data_ptr(), d.a = a.const_data_ptr();
  d.seed = seed ? reinterpret_cast<const long long*>(seed->const_data_ptr<int64_t>()) : nullptr;
  d.s = s.mutable_data_ptr();
  d.mask = seed ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  d.M = M, d.K = K, d.R = R, d.ld_x = pitch(x), d.ld_a = pitch(a);
  d.threshold = static_cast<unsigned>(threshold);
  d.dtype = dtype_code(x.scalar_type());
  C10_CUDA_CHECK(static_cast<cudaError_t>(lora_down_sm90(&d, sms, current_stream(x))));

  OptionalTensor added = bias;
  if (bias && bias->scalar_type() != x.scalar_type()) added = bias->to(at::kFloat);
  if (added) added = added->contiguous();
  if (added && reinterpret_cast<uintptr_t>(added->const_data_ptr()) % 16 != 0) added = added->clone();
  return {gemm(x, weight->t(), s, b.t(), scaling, added, nullptr, sms), s, mask};
}

// g [M, R], dlora_b and dbias from one read of dy; undefined where not asked for.
std::tuple<Tensor, Tensor, Tensor> from_dy(const Tensor& dy, const Tensor& b, const OptionalTensor& s, double scaling,
                                           bool need_g, bool need_db, bool need_dbias, at::ScalarType db_dtype, int sms) {
  const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  const int64_t M = dy.size(0), N = dy.size(1), R = b.size(1);
  Tensor g, db, dbias, s_rows;
  LoraDy d{};
  if (need_g) {
    g = at::empty({M, R}, options);
    d.g = g.mutable_data_ptr();
  }
  if (need_db) {
    s_rows = with_rows(s->to(dy.scalar_type()).contiguous());
    db = at::empty({N, R}, options.dtype(db_dtype));
    d.s = s_rows.const_data_ptr(), d.db = db.mutable_data_ptr();
  }
  if (need_dbias) {
    dbias = at::empty({N}, options.dtype(at::kFloat));
    d.dbias = dbias.mutable_data_ptr<float>();
  }
  if (!need_g && !need_db && !need_dbias) return {g, db, dbias};
  const int64_t bytes = lora_dy_workspace(M, N, R, need_g, need_db, need_dbias, sms);
  const Tensor scratch = at::empty({bytes / 4}, options.dtype(at::kFloat));
  d.dy = dy.const_data_ptr(), d.b = b.const_data_ptr(), d.workspace = scratch.mutable_data_ptr<float>();
  d.scaling = static_cast<float>(scaling);
  d.M = M, d.N = N, d.R = R, d.ld_dy = pitch(dy), d.ld_b = pitch(b);
  d.dtype = dtype_code(dy.scalar_type());
  d.db_fp32 = db_dtype == at::kFloat;
  C10_CUDA_CHECK(static_cast<cudaError_t>(lora_dy_sm90(&d, sms, current_stream(dy))));
  return {g, db, dbias};
}

Tensor from_x(const Tensor& x, const Tensor& g, const unsigned char* mask, double scaling, at::ScalarType da_dtype, int sms) {
  const int64_t M = x.size(0), K = x.size(1), R = g.size(1);
  Tensor da = at::empty({R, K}, x.options().memory_format(at::MemoryFormat::Contiguous).dtype(da_dtype));
  LoraDa d{};
  d.x = x.const_data_ptr(), d.g = g.const_data_ptr(), d.mask = mask, d.da = da.mutable_data_ptr();
  d.scaling = static_cast<float>(scaling);
  d.M = M, d.K = K, d.R = R, d.ld_x = pitch(x);
  d.dtype = dtype_code(x.scalar_type());
  d.da_fp32 = da_dtype == at::kFloat;
  C10_CUDA_CHECK(static_cast<cudaError_t>(lora_da_sm90(&d, sms, current_stream(x))));
  return da;
}

bool takes_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_a,
                    const Tensor& lora_b, const OptionalTensor& s, const Tensor& mask, bool need_dx, bool need_dlora_a,
                    bool need_dlora_b) {
  if (need_dx && !weight) return false;
  const OptionalTensor base = need_dx ? weight : OptionalTensor();
  if (refusal(dy, lora_b.size(0), base, lora_a, lora_b, mask.numel() > 0) != nullptr) return false;
  const int64_t M = dy.size(0), K = lora_a.size(1), R = lora_a.size(0);
  if (need_dlora_a && !(x && x->dim() == 2 && x->size(0) == M && x->size(1) == K && x->scalar_type() == dy.scalar_type() &&
                        x->device() == dy.device() && has_rows(*x)))
    return false;
  if (need_dlora_b && !(s && s->dim() == 2 && s->size(0) == M && s->size(1) == R && s->device() == dy.device()))
    return false;
  if (mask.numel() == 0) return true;
  return mask.is_contiguous() && mask.scalar_type() == at::kByte && mask.device() == dy.device() && mask.dim() == 2 &&
         mask.size(0) == M && mask.size(1) == (K + 7) / 8 && reinterpret_cast<uintptr_t>(mask.const_data_ptr()) % 16 == 0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight,
                                                    const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& s,
                                                    const Tensor& mask, double scaling, bool need_dx, bool need_dlora_a,
                                                    bool need_dlora_b, bool need_dbias) {
  if (!takes_backward(dy, x, weight, lora_a, lora_b, s, mask, need_dx, need_dlora_a, need_dlora_b)) {
    static const auto general = general_op<decltype(backward)>("peft_kernels::lora_linear_bwd_general");
    return general.call(dy, x, weight, lora_a, lora_b, s, mask, scaling, need_dx, need_dlora_a, need_dlora_b, need_dbias);
  }
  const BelowAutogradAndAutocast below;
  const c10::cuda::CUDAGuard guard(dy.device());
  const int sms = chip_of(dy).sms;
  const at::ScalarType dtype = dy.scalar_type();
  const unsigned char* bits = mask.numel() > 0 ? mask.const_data_ptr<uint8_t>() : nullptr;
  const auto none = [&] { return at::empty({0}, dy.options()); };  // a new one each: outputs never share memory
  const bool need_g = need_dx || need_dlora_a;
  const auto [g, db, dbias] = from_dy(dy, adapter(lora_b, dtype), s, scaling, need_g, need_dlora_b, need_dbias,
                                      lora_b.scalar_type(), sms);
  Tensor dx, da;
  if (need_dx) dx = gemm(dy, *weight, g, adapter(lora_a, dtype), scaling, std::nullopt, bits, sms);
  if (need_dlora_a) da = from_x(*x, g, bits, scaling, lora_a.scalar_type(), sms);
  return {need_dx ? dx : none(), need_dlora_a ? da : none(), need_dlora_b ? db : none(), need_dbias ? dbias : none()};
}

}  // namespace

void enable_hopper(bool enabled) { hopper_enabled.store(enabled, std::memory_order_relaxed); }

// For coverage(): why a call with x like `rows` goes to the general kernels, "" where it does not.
static std::string refusal_text(const Tensor& rows, const OptionalTensor& weight, const Tensor& lora_a,
                                const Tensor& lora_b, bool dropout) {
  if (!weight) return "there is no base weight";
  const char* reason = refusal(rows, lora_a.size(-1), weight, lora_a, lora_b, dropout);
  return reason == nullptr ? "" : reason;
}

TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def("lora_linear_refusal(Tensor rows, Tensor? weight, Tensor lora_a, Tensor lora_b, bool dropout) -> str",
        TORCH_FN(refusal_text));
}

TORCH_LIBRARY_IMPL(peft_kernels, CUDA, m) {
  m.impl("lora_linear_fwd", TORCH_FN(forward));
  m.impl("lora_linear_bwd", TORCH_FN(backward));
}

}  // namespace peft_kernels
