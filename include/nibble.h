/* Nibble: matrix products with 4-bit AWQ weights and quantized activations. The C ABI, version 1.
 *
 *   y = x * W (+ bias)      x (M, K)   W (K, N) in 4 bits   y (M, N)
 *   W[k][n] = (q[k][n] - z[k / group_size][n]) * s[k / group_size][n],   q and z in 0..15
 *
 * The three steps of use, see examples/gemm_min.c:
 *   1. nibble_weight_create     repacks one weight as it lies in an AWQ checkpoint
 *   2. nibble_gemm_plan         chooses a kernel for a shape, or says why there is none
 *   3. nibble_gemm              quantizes x, multiplies, writes y; as often as wanted
 *
 * Rules that hold for every function
 *   - Nothing is printed, thrown or exited. Failure is a nibble_status; its message names what was
 *     expected and what was found. Outputs of a failed call are unspecified unless said otherwise.
 *   - Matrices are row-major; strides count elements, not bytes; sizes are in elements unless the
 *     name ends in _bytes. Integers and floats are little-endian.
 *   - The caller owns every buffer it passes. The library keeps no pointer after a call returns.
 *   - All functions may be called from several threads at once, as long as no two calls write to
 *     the same buffer or workspace.
 *   - Results do not depend on the number of threads, on M or on the kernel: bit for bit, except
 *     NIBBLE_TENSOR, whose single scale is taken from the whole batch. The floating-point
 *     environment must be the default one: round to nearest, no flush to zero.
 *   - Structs that the caller fills must be zero-initialised first: `nibble_problem p = {0};`.
 */
#ifndef NIBBLE_H
#define NIBBLE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define NIBBLE_API __attribute__((visibility("default")))
#else
#define NIBBLE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define NIBBLE_ABI_VERSION 1

/* ---- status ---------------------------------------------------------------------------------- */

typedef enum nibble_code {
  NIBBLE_OK = 0,
  NIBBLE_INVALID_ARGUMENT = 1, /* a documented precondition does not hold */
  NIBBLE_UNSUPPORTED = 2,      /* well-formed, but no kernel, format or device here handles it */
  NIBBLE_CORRUPT_FILE = 3,
  NIBBLE_IO_ERROR = 4,
  NIBBLE_OUT_OF_MEMORY = 5,
  NIBBLE_NON_FINITE = 6, /* NaN or infinity in activations that are to be quantized */
  NIBBLE_INTERRUPTED = 7
} nibble_code;

typedef struct nibble_status {
  int32_t code;      /* a nibble_code */
  char message[508]; /* zero-terminated, empty when code is NIBBLE_OK; long ones are cut */
} nibble_status;

/* NIBBLE_ABI_VERSION of the library that was loaded; compare before anything else. */
NIBBLE_API int32_t nibble_abi_version(void);
/* Release, e.g. "0.1.0". Static. */
NIBBLE_API const char* nibble_version(void);

/* ---- types ----------------------------------------------------------------------------------- */

typedef enum nibble_dtype { NIBBLE_F32 = 0, NIBBLE_F16 = 1, NIBBLE_BF16 = 2 } nibble_dtype;

typedef enum nibble_mode {
  NIBBLE_W4A16 = 0, /* float activations, fp32 accumulation */
  NIBBLE_W4A8 = 1,  /* int8 activations, exact int32 sums per group, fp32 epilogue */
  NIBBLE_W4A4 = 2,  /* int4 activations, likewise */
  NIBBLE_W4A8_FP8 = 3, /* e4m3 activations, float sums; CUDA devices only */
  NIBBLE_W4A4_WIDE = 4 /* NIBBLE_W4A4 but for the groups of nibble_input.wide_groups, whose
                          activations are int8; NIBBLE_GROUP only; CPU only */
} nibble_mode;

/* How many elements of x share one activation scale t (x ~ a * t). Ignored by NIBBLE_W4A16. */
typedef enum nibble_granularity {
  NIBBLE_TENSOR = 0,        /* one t from all of x */
  NIBBLE_TOKEN = 1,         /* one t per row */
  NIBBLE_GROUP = 2,         /* one t per row and K-group of the weight */
  NIBBLE_STATIC_TENSOR = 3, /* one given t */
  NIBBLE_STATIC_GROUP = 4   /* K / group_size given t */
} nibble_granularity;

/* How a weight lies in memory. G = K / group_size. Drawn in docs/formats.md. */
typedef enum nibble_layout {
  NIBBLE_AWQ_GEMM = 0, /* qweight int32 (K, N/8), qzeros int32 (G, N/8), scales (G, N) */
  NIBBLE_AWQ_GEMV = 1, /* qweight int32 (N, K/8), qzeros int32 (N, W), scales (N, 8 * W) */
  NIBBLE_CT_PACK = 2   /* compressed-tensors: weight_packed int32 (N, ceil(K/8)),
                          weight_zero_point int32 (ceil(N/8), G), weight_scale (N, G) */
} nibble_layout;

/* ---- weights --------------------------------------------------------------------------------- */

typedef struct nibble_weight_desc {
  int64_t k;           /* input channels */
  int64_t n;           /* output channels; a multiple of 8 */
  int64_t group_size;  /* divides k; -1: k */
  int32_t layout;      /* a nibble_layout */
  int32_t scale_dtype; /* NIBBLE_F16 or NIBBLE_BF16 */
  const void* qweight; /* codes, any alignment */
  const void* qzeros;  /* zero points, any alignment; null: 8 everywhere (symmetric) */
  const void* scales;  /* any alignment; any sign, subnormals included; not checked: NaN and
                          infinity go into y */
  int64_t zero_words;  /* NIBBLE_AWQ_GEMV: int32 words per row of qzeros (W above); else 0 */
  const void* bias;    /* (N) or null */
  int32_t bias_dtype;  /* a nibble_dtype */
  int32_t reserved;    /* 0 */
} nibble_weight_desc;

/* One weight in the layout of the CPU kernels: one 64-byte aligned block of memory that begins with
 * its sizes and holds no pointers. Immutable; may be shared by threads. */
typedef struct nibble_weight nibble_weight;

/* Repacks a weight: 4.1875 bits per weight at group size 128, n rounded up to 32. On success *out
 * is a new weight to be released with nibble_weight_destroy; on failure *out is null. threads <= 0:
 * all CPUs this process may use. */
NIBBLE_API nibble_status nibble_weight_create(nibble_weight** out, const nibble_weight_desc* desc,
                                              int32_t threads);
NIBBLE_API void nibble_weight_destroy(nibble_weight* weight); /* null is fine */
NIBBLE_API int64_t nibble_weight_k(const nibble_weight* weight);
NIBBLE_API int64_t nibble_weight_n(const nibble_weight* weight);
NIBBLE_API int64_t nibble_weight_group_size(const nibble_weight* weight);
NIBBLE_API size_t nibble_weight_bytes(const nibble_weight* weight);

/* The same in memory of the caller: nibble_weight_pack writes the block that nibble_weight_create
 * would, to `memory`, 64-byte aligned, of exactly nibble_weight_packed_bytes. The block may be
 * copied as it is, to memory aligned like it; it is never passed to nibble_weight_destroy. */
NIBBLE_API nibble_status nibble_weight_packed_bytes(size_t* out, const nibble_weight_desc* desc);
NIBBLE_API nibble_status nibble_weight_pack(void* memory, size_t bytes,
                                            const nibble_weight_desc* desc, int32_t threads);
/* *out = memory, if it holds a weight of at most `bytes`; else *out is null. Allocates nothing, and
 * what it returns is not to be destroyed. */
NIBBLE_API nibble_status nibble_weight_open(const nibble_weight** out, const void* memory,
                                            size_t bytes);

/* out (k, n) f32: (q - z) * s, exactly (a bf16 scale above 2^124 may overflow to infinity). */
NIBBLE_API nibble_status nibble_dequantize(const nibble_weight_desc* desc, float* out);

/* ---- plan ------------------------------------------------------------------------------------ */

typedef struct nibble_problem {
  int64_t m; /* rows of x; 0 is allowed */
  int64_t n; /* output channels of all weights that will share x */
  int64_t k;
  int64_t group_size;  /* -1: k */
  int32_t mode;        /* a nibble_mode */
  int32_t x_dtype;     /* a nibble_dtype */
  int32_t y_dtype;     /* a nibble_dtype */
  int32_t granularity; /* a nibble_granularity */
  int32_t asymmetric;  /* 1: activations get zero points; NIBBLE_W4A4 with a dynamic granularity */
  int32_t threads;     /* <= 0: all CPUs this process may use */
} nibble_problem;

/* A plan is a plain value: made without allocation, copied freely, nothing to release. It is valid
 * for exactly its problem on this machine, in this process. Treat the contents as opaque. */
typedef struct nibble_plan {
  uint64_t opaque[32];
} nibble_plan;

/* kernel: a name from nibble_kernel_name forces that kernel; null lets the library choose, or the
 * environment variable NIBBLE_KERNEL force. An unknown name, or a kernel that cannot run here, is
 * an error, never a fallback. On failure *out is untouched. */
NIBBLE_API nibble_status nibble_gemm_plan(nibble_plan* out, const nibble_problem* problem,
                                          const char* kernel);
/* The kernel that this plan runs. Static. */
NIBBLE_API const char* nibble_plan_kernel(const nibble_plan* plan);
/* One line about the plan, zero-terminated, cut to `bytes`. Returns the length it would need. */
NIBBLE_API size_t nibble_plan_describe(const nibble_plan* plan, char* text, size_t bytes);
/* Size of the workspace that nibble_gemm needs, 64-byte aligned. */
NIBBLE_API size_t nibble_gemm_workspace_bytes(const nibble_plan* plan);

/* ---- products -------------------------------------------------------------------------------- */

typedef struct nibble_input {
  const void* x;              /* (M, K) of x_dtype */
  int64_t x_stride;           /* elements between rows; >= K */
  float clip;                 /* dynamic granularities: the range is multiplied by it; in (0, 1];
                                 0 means 1 */
  int32_t reserved;           /* 0 */
  const float* static_scales; /* NIBBLE_STATIC_TENSOR: (1); NIBBLE_STATIC_GROUP: (K/group_size) */
  const uint8_t* wide_groups; /* read for NIBBLE_W4A4_WIDE only: (K/group_size), not 0: int8 */
} nibble_input;

typedef struct nibble_target {
  const nibble_weight* weight; /* k and group_size of the problem */
  void* y;                     /* (M, n of this weight) of y_dtype */
  int64_t y_stride;            /* elements between rows; >= n */
} nibble_target;

/* For each target: y = x * W + bias. x is quantized once for all of them (q, k, v; gate, up), a
 * block of rows at a time, in the workspace. Buffers must not overlap.
 * NaN or infinity in x: NIBBLE_NON_FINITE, naming the first such row (not for NIBBLE_W4A16). */
NIBBLE_API nibble_status nibble_gemm(const nibble_plan* plan, const nibble_input* input,
                                     const nibble_target* targets, int32_t num_targets,
                                     void* workspace);

/* The same for one weight that lies in memory of the caller, as nibble_weight_pack wrote it: it is
 * checked as nibble_weight_open does, and has the n of the plan. */
NIBBLE_API nibble_status nibble_gemm_packed(const nibble_plan* plan, const nibble_input* input,
                                            const void* packed, size_t packed_bytes, void* y,
                                            int64_t y_stride, void* workspace);

/* The same for activations that are quantized already: codes (M, K) in -128..127, for NIBBLE_W4A4
 * in -15..15 with any zero point taken off; scales (M), or (M, K/group_size) for NIBBLE_GROUP and
 * NIBBLE_STATIC_GROUP. */
NIBBLE_API nibble_status nibble_gemm_quantized(const nibble_plan* plan, const int8_t* codes,
                                               int64_t code_stride, const float* scales,
                                               const nibble_target* targets, int32_t num_targets,
                                               void* workspace);

/* The activation quantizer alone, as nibble_gemm applies it: codes (M, K), scales as above, sums
 * (M, K/group_size) of the codes of each group, or null.
 * Rounding is half to even; a row or group of zeros gives zeros with scale 0. */
NIBBLE_API nibble_status nibble_quantize_activations(const nibble_plan* plan,
                                                     const nibble_input* input, int8_t* codes,
                                                     float* scales, int32_t* sums);

/* ---- what is here ---------------------------------------------------------------------------- */

NIBBLE_API int32_t nibble_kernel_count(void);
/* index in [0, nibble_kernel_count()); else null. Static. */
NIBBLE_API const char* nibble_kernel_name(int32_t index);
/* Why this kernel cannot run on this machine; null if it can. An index out of range is a reason
 * too. Static. */
NIBBLE_API const char* nibble_kernel_missing(int32_t index);

/* ---- CUDA ------------------------------------------------------------------------------------ */

/* The same product on a GPU. Only these functions touch one; a library built without CUDA, or a
 * machine without a driver, answers NIBBLE_UNSUPPORTED with the reason. Rules, besides those above:
 *   - x, y, static_scales and the workspace lie in memory of the plan's device; x and y, and all
 *     their rows, begin at multiples of 16 bytes, the workspace at one of 256.
 *   - stream is a cudaStream_t; null: the default stream. nibble_cuda_gemm allocates nothing and
 *     waits for nothing; it may be captured into a CUDA graph. Errors of a kernel while it runs are
 *     those of the stream.
 *   - The first NIBBLE_CUDA_FLAG_BYTES of a workspace are zeroed once before its first use,
 *     whatever plans share it. Products that run at the same time need workspaces of their own.
 *   - What a product reads and writes, the weight too, lives until the stream is past it.
 *   - Integer sums are exact. The order of the float operations is the plan's: the same plan gives
 *     the same bits, but, unlike above, another plan (another m, another kernel) may round
 *     differently. NaN or infinity in a row of x makes that row of y NaN; nothing is reported.
 *   - No function leaves another device current than it found. */

#define NIBBLE_CUDA_FLAG_BYTES 4096

typedef struct nibble_cuda_info {
  char name[256];          /* zero-terminated */
  int32_t capability;      /* 10 * major + minor: 90 for an H100 or H200 */
  int32_t multiprocessors;
  int64_t memory_bytes;
  int64_t l2_bytes;
} nibble_cuda_info;

NIBBLE_API nibble_status nibble_cuda_device_count(int32_t* out);
NIBBLE_API nibble_status nibble_cuda_device_info(nibble_cuda_info* out, int32_t device);

/* One weight in device memory: 4.16 bits per weight at group size 128. */
typedef struct nibble_cuda_weight nibble_cuda_weight;

/* Copies and packs a weight that lies in host memory; returns when it is done. Group sizes: 32, 64,
 * multiples of 128, and K above 128. On failure *out is null; NIBBLE_OUT_OF_MEMORY says how much
 * was wanted and how much is free. */
NIBBLE_API nibble_status nibble_cuda_weight_create(nibble_cuda_weight** out,
                                                   const nibble_weight_desc* desc, int32_t device);
/* null is fine. No product may still use it. */
NIBBLE_API void nibble_cuda_weight_destroy(nibble_cuda_weight* weight);
NIBBLE_API size_t nibble_cuda_weight_bytes(const nibble_cuda_weight* weight);

/* The same in device memory of the caller, 256-byte aligned, of exactly nibble_cuda_packed_bytes;
 * pack returns when it is done. Nothing in the memory tells its shape: nibble_cuda_gemm_packed
 * takes that from its plan, and the dtype of the scales and whether there is a bias from the size.
 */
NIBBLE_API nibble_status nibble_cuda_packed_bytes(size_t* out, const nibble_weight_desc* desc);
NIBBLE_API nibble_status nibble_cuda_pack(void* packed, size_t packed_bytes,
                                          const nibble_weight_desc* desc, int32_t device);

/* Like nibble_plan. */
typedef struct nibble_cuda_plan {
  uint64_t opaque[64];
} nibble_cuda_plan;

/* kernel: a name that forces that kernel, or null. problem->threads is ignored; problem->n is that
 * of the one weight. NIBBLE_W4A16 wants x of f16 or bf16 and K a multiple of 8; NaN and infinity in
 * it go the way of IEEE arithmetic. On failure *out is untouched. */
NIBBLE_API nibble_status nibble_cuda_gemm_plan(nibble_cuda_plan* out,
                                               const nibble_problem* problem, int32_t device,
                                               const char* kernel);
/* The kernel that multiplies. Static. nibble_cuda_gemm of one or two rows of f16 or bf16 may run
 * one that quantizes as well, with the same bits: nibble_cuda_plan_describe says so. */
NIBBLE_API const char* nibble_cuda_plan_kernel(const nibble_cuda_plan* plan);
/* As nibble_plan_describe. */
NIBBLE_API size_t nibble_cuda_plan_describe(const nibble_cuda_plan* plan, char* text, size_t bytes);
NIBBLE_API size_t nibble_cuda_workspace_bytes(const nibble_cuda_plan* plan);
/* NIBBLE_CUDA_FLAG_BYTES if this plan's kernel needs the flags, 0 if the workspace may hold
 * anything: for those who take a new workspace for each product. */
NIBBLE_API size_t nibble_cuda_zeroed_bytes(const nibble_cuda_plan* plan);

/* y = x * W + bias on `stream`. */
NIBBLE_API nibble_status nibble_cuda_gemm(const nibble_cuda_plan* plan, const nibble_input* input,
                                          const nibble_cuda_weight* weight, void* y,
                                          int64_t y_stride, void* workspace, void* stream);
/* The same with a weight that nibble_cuda_pack wrote. */
NIBBLE_API nibble_status nibble_cuda_gemm_packed(const nibble_cuda_plan* plan,
                                                 const nibble_input* input, const void* packed,
                                                 size_t packed_bytes, void* y, int64_t y_stride,
                                                 void* workspace, void* stream);

/* Quantized activations in device memory, as the kernel of one plan reads them. */
typedef struct nibble_cuda_operand {
  int8_t* codes;  /* (M, K rounded up to 512), 16-byte aligned, in the kernel's order: natural for
                     w4a8_mma_sm80 */
  float* scales;  /* (M), or (M, K/group_size) for NIBBLE_GROUP and NIBBLE_STATIC_GROUP */
  int32_t* sums;  /* null, or (M, K rounded up to 512 / P): of the codes of each group of
                     P = group_size if that is 32 or 64, else 128; written, never read */
  uint32_t* range; /* scratch of 4 words for NIBBLE_TENSOR, else null */
} nibble_cuda_operand;

/* The two halves of nibble_cuda_gemm_packed; not for NIBBLE_W4A16. */
NIBBLE_API nibble_status nibble_cuda_quantize_activations(const nibble_cuda_plan* plan,
                                                          const nibble_input* input,
                                                          const nibble_cuda_operand* to,
                                                          void* stream);
NIBBLE_API nibble_status nibble_cuda_gemm_quantized(const nibble_cuda_plan* plan,
                                                    const nibble_cuda_operand* operand,
                                                    const void* packed, size_t packed_bytes,
                                                    void* y, int64_t y_stride, void* workspace,
                                                    void* stream);

#ifdef __cplusplus
}
#endif

#endif /* NIBBLE_H */
