/* The hot lines of pcb.py and of the counting in kernels.py, fused: a block is walked through once, strip by strip, from the bytes of the files to
   counts or to the bytes of the output, and what lies between stays in the first-level cache.

   Specification: pcb.py. Each function repeats its operations in its order, each rounded on its own (compile with -ffp-contract=off: a fused
   multiply-add would round differently), so that both give the same bits; tests/test_kernels.py holds them together. Nothing here depends on
   the width of the vector unit, so the clones below for newer processors also give the same bits.

   Plain C, called through ctypes: no Python object is touched, and the interpreter lock is free meanwhile. */

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { STRIP = 512 }; /* elements: with a few tasks, the working set of a strip stays in the first-level cache */

INLINE float as_float(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE int32_t as_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE double as_double(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
INLINE int64_t as_bits64(double x) { int64_t bits; memcpy(&bits, &x, 8); return bits; }

INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

/* pcb.exp; with `normal` for x >= -80 only, where the power of two needs no second factor (the bits are the same). */
INLINE float exp_(float x, int normal) {
    if (!normal) x = x < -104.0f ? -104.0f : x;
    /* Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, as torch.round does, on any vector unit. */
    float k = (x * 0x1.715476p+0f + 12582912.0f) - 12582912.0f;
    float r = (x - k * 0x1.62e000p-1f) - k * 0x1.0bfbe8p-15f;
    float q = 0x1.6a23d0p-10f;
    q = q * r + 0x1.123a20p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    float result = ((r * r) * q + r) + 1.0f;
    int32_t n = (int32_t)k, half = n >> 1;
    if (normal) return result * as_float((n + 127) << 23);
    return result * as_float((half + 127) << 23) * as_float((n - half + 127) << 23);
}

/* pcb.exp in float64; -708 <= x <= 1, which the scores of up to 700 tasks are, needs no second factor. */
INLINE double exp64(double x) {
    double k = (x * 0x1.71547652b82fep+0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - k * 0x1.62e42fefa0000p-1) - k * 0x1.cf79abc9e3b3ap-40;
    double q = 0x1.1e3d06ff62840p-29;
    q = q * r + 0x1.af6c1db77d1aap-26;
    q = q * r + 0x1.27e5b493405efp-22;
    q = q * r + 0x1.71ddf00282b2ap-19;
    q = q * r + 0x1.a01a01364e078p-16;
    q = q * r + 0x1.a01a01b38a16dp-13;
    q = q * r + 0x1.6c16c16c305ddp-10;
    q = q * r + 0x1.111111110ec3fp-7;
    q = q * r + 0x1.5555555555503p-5;
    q = q * r + 0x1.555555555555bp-3;
    q = q * r + 0x1.0000000000000p-1;
    return (((r * r) * q + r) + 1.0) * as_double(((int64_t)(int32_t)k + 1023) << 52);
}

/* pcb.tanh_unit */
INLINE float tanh_unit(float x) {
    float s = x * x;
    float q = -0x1.77dd4ep-12f;
    q = q * s + 0x1.2da504p-9f;
    q = q * s + -0x1.0460c8p-7f;
    q = q * s + 0x1.600994p-6f;
    q = q * s + -0x1.b96222p-5f;
    q = q * s + 0x1.110be2p-3f;
    q = q * s + -0x1.55553cp-2f;
    return ((q * s) * x) + x;
}

/* pcb.tanh */
INLINE float tanh_(float x) {
    float size = fabsf(x);
    float bounded = size > 10.0f ? 10.0f : size;
    float tail = copysignf(1.0f - 2.0f / (exp_(bounded * 2.0f, 1) + 1.0f), x);
    float near = tanh_unit(clamp(x, -1.0f, 1.0f));
    return size <= 1.0f ? near : tail;
}

INLINE float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

/* What is asked of a block, in the order of kernels.QUESTIONS. */
enum { MAGNITUDE, RELEASED, PAIRWISE, PAPER, TIES, TASK_ARITHMETIC, LINEAR };

/* A block as it was read from the files. */
typedef struct {
    int64_t n, size;         /* tasks, elements */
    const void *const *data; /* [n + 1]: the base (NULL: zeros), then the models */
    const int64_t *bfloat16; /* [n + 1]: 1: bfloat16, 0: float32 */
    float *scratch;          /* rows of STRIP: theta, tau [n], and 2 n more for scores */
} Block;

/* answers.Thresholds as arrays, with what follows from them for all elements alike; a method leaves NULL what it has no use for. */
typedef struct {
    const float *low, *high, *range, *t, *span;      /* [n]; range = high - low and span = max beta - t, or infinity where that is 0 */
    const double *paper_t, *pair_low, *pair_range;   /* [n], [pairs], [pairs]: paper */
    const double *intra_factor, *pair_factor;        /* [n], [pairs]: D / softmax denominator */
} Thresholds;

INLINE float *theta_of(const Block *k) { return k->scratch; }
INLINE float *tau_of(const Block *k, int64_t i) { return k->scratch + (1 + i) * STRIP; }
INLINE float *u_of(const Block *k, int64_t i) { return k->scratch + (1 + k->n + i) * STRIP; }
INLINE float *beta_of(const Block *k, int64_t i) { return k->scratch + (1 + 2 * k->n + i) * STRIP; }
INLINE double *paper_beta_of(const Block *k, int64_t i) { return (double *)u_of(k, 0) + i * STRIP; }

INLINE float widened(uint16_t x) { return as_float((int32_t)((uint32_t)x << 16)); }

/* theta and tau of m <= STRIP elements from `at` on. */
INLINE void load_strip(const Block *k, int64_t at, int64_t m) {
    float *restrict theta = theta_of(k);
    if (!k->data[0])
        for (int64_t b = 0; b < m; b++) theta[b] = 0.0f;
    else if (k->bfloat16[0]) {
        const uint16_t *restrict x = (const uint16_t *)k->data[0] + at;
        for (int64_t b = 0; b < m; b++) theta[b] = widened(x[b]);
    } else
        memcpy(theta, (const float *)k->data[0] + at, (size_t)m * 4);
    for (int64_t i = 0; i < k->n; i++) {
        float *restrict tau = tau_of(k, i);
        if (k->bfloat16[i + 1]) {
            const uint16_t *restrict x = (const uint16_t *)k->data[i + 1] + at;
            for (int64_t b = 0; b < m; b++) tau[b] = widened(x[b]) - theta[b];
        } else {
            const float *restrict x = (const float *)k->data[i + 1] + at;
            for (int64_t b = 0; b < m; b++) tau[b] = x[b] - theta[b];
        }
    }
}

/* --- scores ------------------------------------------------------------------------------------------------------------------------- */

/* pcb.beta_released of a loaded strip; `few`: n <= 80, so that exp needs no care for subnormal numbers. */
INLINE void beta_released(const Block *k, const Thresholds *s, int64_t m, const int few) {
    const float tasks = (float)k->n;
    float *restrict total = u_of(k, 0);
    for (int64_t b = 0; b < m; b++) total[b] = tau_of(k, 0)[b];
    for (int64_t i = 1; i < k->n; i++) {
        const float *restrict x = tau_of(k, i);
        for (int64_t b = 0; b < m; b++) total[b] += x[b];
    }
    for (int64_t i = 0; i < k->n; i++) {
        const float low = s->low[i], high = s->high[i], range = s->range[i];
        const float *restrict x = tau_of(k, i);
        float *restrict beta = beta_of(k, i);
        int32_t largest = 0; /* as bits: an integer maximum vectorises, one of floats does not */
        for (int64_t b = 0; b < m; b++) {
            beta[b] = x[b] * total[b];
            int32_t size = as_bits(beta[b]) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        if (largest <= as_bits(1.0f)) /* nearly always: task vectors are small */
            for (int64_t b = 0; b < m; b++) beta[b] = tanh_unit(beta[b]);
        else
            for (int64_t b = 0; b < m; b++) beta[b] = tanh_(beta[b]);
        for (int64_t b = 0; b < m; b++) {
            float z = (clamp(fabsf(x[b]), low, high) - low) / range;
            beta[b] = beta[b] * exp_((z * z - 1.0f) * tasks, few);
        }
    }
}

/* pcb.beta_pairwise of a loaded strip. */
INLINE void beta_pairwise(const Block *k, const Thresholds *s, int64_t m, const int few) {
    const float tasks = (float)k->n;
    for (int64_t i = 0; i < k->n; i++) {
        const float low = s->low[i], high = s->high[i], range = s->range[i];
        const float *restrict x = tau_of(k, i);
        float *restrict u = u_of(k, i), *restrict inter = beta_of(k, i);
        for (int64_t b = 0; b < m; b++) {
            /* sign(x) z: where x is 0, so is z, and a zero's sign shows nowhere in beta */
            u[b] = copysignf((clamp(fabsf(x[b]), low, high) - low) / range, x[b]);
            inter[b] = 0.0f;
        }
    }
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict ui = u_of(k, i);
        float *restrict inter_i = beta_of(k, i);
        for (int64_t b = 0; b < m; b++) inter_i[b] += tanh_unit(ui[b] * ui[b]);
        for (int64_t j = i + 1; j < k->n; j++) {
            const float *restrict uj = u_of(k, j);
            float *restrict inter_j = beta_of(k, j);
            for (int64_t b = 0; b < m; b++) {
                float pair = tanh_unit(ui[b] * uj[b]);
                inter_i[b] += pair;
                inter_j[b] += pair;
            }
        }
    }
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict u = u_of(k, i);
        float *restrict beta = beta_of(k, i);
        for (int64_t b = 0; b < m; b++) beta[b] = beta[b] * exp_((u[b] * u[b] - 1.0f) * tasks, few);
    }
}

/* pcb.paper_pair less 1, of one element */
INLINE double paper_pair(const Thresholds *s, int64_t p, float x, float y) {
    return ((double)x * (double)y - s->pair_low[p]) / s->pair_range[p] - 1.0;
}

/* pcb.beta_paper of a loaded strip. */
INLINE void beta_paper(const Block *k, const Thresholds *s, int64_t m) {
    const double tasks = (double)k->n;
    for (int64_t i = 0; i < k->n; i++)
        for (int64_t b = 0; b < m; b++) paper_beta_of(k, i)[b] = 0.0;
    for (int64_t i = 0, p = 0; i < k->n; i++)
        for (int64_t j = i; j < k->n; j++, p++) {
            const float *restrict x = tau_of(k, i), *restrict y = tau_of(k, j);
            double *restrict inter_i = paper_beta_of(k, i), *restrict inter_j = paper_beta_of(k, j);
            double pair[STRIP];
            for (int64_t b = 0; b < m; b++) pair[b] = exp64(paper_pair(s, p, x[b], y[b])) * s->pair_factor[p];
            for (int64_t b = 0; b < m; b++) inter_i[b] += pair[b];
            if (j != i)
                for (int64_t b = 0; b < m; b++) inter_j[b] += pair[b];
        }
    for (int64_t i = 0, p = 0; i < k->n; p += k->n - i, i++) {
        const float *restrict x = tau_of(k, i);
        double *restrict beta = paper_beta_of(k, i);
        for (int64_t b = 0; b < m; b++) beta[b] = beta[b] * (exp64(paper_pair(s, p, x[b], x[b]) * tasks) * s->intra_factor[i]);
    }
}

/* beta of a loaded strip, into beta_of or paper_beta_of. */
INLINE void beta_strip(const Block *k, const Thresholds *s, int64_t question, int64_t m) {
    if (question == PAPER)
        beta_paper(k, s, m);
    else if (question == RELEASED) {
        if (k->n <= 80)
            beta_released(k, s, m, 1);
        else
            beta_released(k, s, m, 0);
    } else {
        if (k->n <= 80)
            beta_pairwise(k, s, m, 1);
        else
            beta_pairwise(k, s, m, 0);
    }
}

INLINE int64_t strip_at(const Block *k, int64_t at) { return k->size - at < STRIP ? k->size - at : STRIP; }

/* tau (MAGNITUDE) or beta of a block -> out [n, size], float, for PAPER double. */
EXPORT CLONES void pcb_scores(const Block *k, const Thresholds *s, int64_t question, void *out) {
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int64_t m = strip_at(k, at);
        load_strip(k, at, m);
        if (question != MAGNITUDE) beta_strip(k, s, question, m);
        for (int64_t i = 0; i < k->n; i++)
            if (question == PAPER)
                memcpy((double *)out + i * k->size + at, paper_beta_of(k, i), (size_t)m * 8);
            else
                memcpy((float *)out + i * k->size + at, question == MAGNITUDE ? tau_of(k, i) : beta_of(k, i), (size_t)m * 4);
    }
}

/* --- counting ----------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t lo, hi;
    int64_t below_lo, upto_lo, below_hi, upto_hi; /* counts of keys, added to what is there */
    void *inside;                                 /* keys strictly between, room for a block */
    int64_t found;                                /* how many */
} Bracket;

INLINE int32_t key32(float x, int magnitude) {
    int32_t bits = as_bits(x), size = bits & 0x7fffffff;
    return magnitude || bits >= 0 ? size : -size;
}

INLINE int64_t key64(double x, int magnitude) {
    int64_t bits = as_bits64(x), size = bits & 0x7fffffffffffffff;
    return magnitude || bits >= 0 ? size : -size;
}

/* Counts the keys of a strip (of |x|, if magnitude) against a bracket, and returns the largest key. Keys are integers that order float values
   (kernels.reference.keys): of 32 bits for float, of 64 for double. Most strips hold no key in lo..hi, so those are looked at apart. */
#define DEFINE_COUNT(NAME, FLOAT, INT, KEY, SMALLEST)                                                            \
    INLINE int64_t NAME(const FLOAT *restrict x, int32_t m, const int magnitude, Bracket *bracket) {             \
        const INT lo = (INT)bracket->lo, hi = (INT)bracket->hi;                                                  \
        INT below_lo = 0, upto_hi = 0, largest = SMALLEST;                                                       \
        for (int32_t b = 0; b < m; b++) {                                                                        \
            INT key = KEY(x[b], magnitude);                                                                      \
            below_lo += key < lo;                                                                                \
            upto_hi += key <= hi;                                                                                \
            largest = key > largest ? key : largest;                                                             \
        }                                                                                                        \
        INT at_lo = 0, at_hi = 0;                                                                                \
        if (upto_hi > below_lo) {                                                                                \
            uint64_t hits[STRIP / 8]; /* a byte per element; few are inside, so most words are 0 and skipped */  \
            uint8_t *hit = (uint8_t *)hits;                                                                      \
            hits[(m - 1) / 8] = 0;                                                                               \
            for (int32_t b = 0; b < m; b++) {                                                                    \
                INT key = KEY(x[b], magnitude);                                                                  \
                at_lo += key == lo;                                                                              \
                at_hi += key == hi;                                                                              \
                hit[b] = (uint8_t)((key > lo) & (key < hi));                                                     \
            }                                                                                                    \
            INT *inside = (INT *)bracket->inside + bracket->found;                                               \
            if (upto_hi - below_lo > at_lo + (hi > lo ? at_hi : 0))                                              \
                for (int32_t w = 0; w < (m + 7) / 8; w++)                                                        \
                    if (hits[w])                                                                                 \
                        for (int32_t b = 8 * w; b < 8 * w + 8; b++)                                              \
                            if (hit[b]) *inside++ = KEY(x[b], magnitude);                                        \
            bracket->found = inside - (INT *)bracket->inside;                                                    \
        }                                                                                                        \
        bracket->below_lo += below_lo;                                                                           \
        bracket->upto_lo += below_lo + at_lo;                                                                    \
        bracket->below_hi += upto_hi - at_hi;                                                                    \
        bracket->upto_hi += upto_hi;                                                                             \
        return largest;                                                                                          \
    }

DEFINE_COUNT(count32, float, int32_t, key32, INT32_MIN)
DEFINE_COUNT(count64, double, int64_t, key64, INT64_MIN)

/* Counts |tau| (MAGNITUDE) or beta of a block against brackets [n, each]; largest [n] is raised to the largest key of each task. */
EXPORT CLONES void pcb_count(const Block *k, const Thresholds *s, int64_t question, Bracket *brackets, int64_t each, int64_t *largest) {
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int32_t m = (int32_t)strip_at(k, at);
        load_strip(k, at, m);
        if (question != MAGNITUDE) beta_strip(k, s, question, m);
        for (int64_t i = 0; i < k->n; i++)
            for (int64_t e = 0; e < each; e++) {
                Bracket *bracket = brackets + i * each + e;
                int64_t top = question == MAGNITUDE ? count32(tau_of(k, i), m, 1, bracket)
                              : question == PAPER   ? count64(paper_beta_of(k, i), m, 0, bracket)
                                                    : count32(beta_of(k, i), m, 0, bracket);
                largest[i] = top > largest[i] ? top : largest[i];
            }
    }
}

/* The smallest and largest tau_i tau_j of each pair i <= j, row by row: low and high [pairs] are widened. Not 0 if a tau is not finite. */
EXPORT CLONES int64_t pcb_extrema(const Block *k, double *low, double *high) {
    uint32_t bad = 0;
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int64_t m = strip_at(k, at);
        load_strip(k, at, m);
        for (int64_t i = 0; i < k->n; i++) {
            const float *restrict x = tau_of(k, i);
            for (int64_t b = 0; b < m; b++) bad |= (uint32_t)((as_bits(x[b]) & 0x7f800000) == 0x7f800000);
        }
        for (int64_t i = 0, p = 0; i < k->n; i++)
            for (int64_t j = i; j < k->n; j++, p++) {
                const float *restrict x = tau_of(k, i), *restrict y = tau_of(k, j);
                double least[16], most[16]; /* lanes: a running minimum of doubles alone would not vectorise */
                for (int l = 0; l < 16; l++) least[l] = low[p], most[l] = high[p];
                int64_t b = 0;
                for (; b + 16 <= m; b += 16)
                    for (int l = 0; l < 16; l++) {
                        double product = (double)x[b + l] * (double)y[b + l];
                        least[l] = product < least[l] ? product : least[l];
                        most[l] = product > most[l] ? product : most[l];
                    }
                for (; b < m; b++) {
                    double product = (double)x[b] * (double)y[b];
                    least[0] = product < least[0] ? product : least[0];
                    most[0] = product > most[0] ? product : most[0];
                }
                for (int l = 0; l < 16; l++) {
                    low[p] = least[l] < low[p] ? least[l] : low[p];
                    high[p] = most[l] > high[p] ? most[l] : high[p];
                }
            }
    }
    return (int64_t)bad;
}

enum { LANES = 16, AT_ONCE = 4 };

/* The products of row x with `count` rows from y on, added to lanes [count][LANES]; m is a multiple of LANES. */
INLINE void add_products(const float *restrict x, const float *restrict y, int64_t m, float *restrict lanes, const int count) {
    float a[LANES], c[LANES], d[LANES], e[LANES];
    memcpy(a, lanes, sizeof a);
    if (count == AT_ONCE) {
        memcpy(c, lanes + LANES, sizeof c), memcpy(d, lanes + 2 * LANES, sizeof d), memcpy(e, lanes + 3 * LANES, sizeof e);
        for (int64_t b = 0; b < m; b += LANES)
            for (int l = 0; l < LANES; l++) {
                a[l] += x[b + l] * y[b + l];
                c[l] += x[b + l] * y[STRIP + b + l];
                d[l] += x[b + l] * y[2 * STRIP + b + l];
                e[l] += x[b + l] * y[3 * STRIP + b + l];
            }
        memcpy(lanes + LANES, c, sizeof c), memcpy(lanes + 2 * LANES, d, sizeof d), memcpy(lanes + 3 * LANES, e, sizeof e);
    } else
        for (int64_t b = 0; b < m; b += LANES)
            for (int l = 0; l < LANES; l++) a[l] += x[b + l] * y[b + l];
    memcpy(lanes, a, sizeof a);
}

/* The products of theta and the tau with each other, summed over a block: rows theta, tau 0, ..., each with itself and those after it, are added
   to gram [(n + 1)(n + 2) / 2]; and how many elements of each tau are 0 to zeros [n]. lanes: room for LANES floats for each of the former.
   What decides no byte may round as is fastest. */
EXPORT CLONES void pcb_gram(const Block *k, float *lanes, double *gram, int64_t *zeros) {
    const int64_t rows = k->n + 1, pairs = rows * (rows + 1) / 2;
    memset(lanes, 0, (size_t)(pairs * LANES) * sizeof(float));
    for (int64_t at = 0, strip = 1; at < k->size; at += STRIP, strip++) {
        const int64_t m = strip_at(k, at), padded = (m + LANES - 1) / LANES * LANES;
        load_strip(k, at, m);
        for (int64_t i = 0; i < rows; i++) {
            float *restrict x = k->scratch + i * STRIP;
            for (int64_t b = m; b < padded; b++) x[b] = 0.0f;
            if (i == 0) continue;
            int32_t found = 0;
            for (int64_t b = 0; b < m; b++) found += x[b] == 0.0f;
            zeros[i - 1] += found;
        }
        for (int64_t i = 0, p = 0; i < rows; i++) {
            const float *x = k->scratch + i * STRIP;
            int64_t j = i;
            for (; j + AT_ONCE <= rows; j += AT_ONCE) add_products(x, k->scratch + j * STRIP, padded, lanes + (p + j - i) * LANES, AT_ONCE);
            for (; j < rows; j++) add_products(x, k->scratch + j * STRIP, padded, lanes + (p + j - i) * LANES, 1);
            p += rows - i;
        }
        if (strip % 16 == 0 || at + STRIP >= k->size) { /* before single precision tells */
            for (int64_t p = 0; p < pairs; p++)
                for (int l = 0; l < LANES; l++) gram[p] += lanes[p * LANES + l], lanes[p * LANES + l] = 0.0f;
        }
    }
}

/* pcb.paper_exponentials of a block -> out [n + pairs, size]: the tasks' intra, then the pairs'. */
EXPORT CLONES void pcb_paper_exponentials(const Block *k, const Thresholds *s, double *out) {
    const double tasks = (double)k->n;
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int64_t m = strip_at(k, at);
        load_strip(k, at, m);
        for (int64_t i = 0, p = 0; i < k->n; i++)
            for (int64_t j = i; j < k->n; j++, p++) {
                const float *restrict x = tau_of(k, i), *restrict y = tau_of(k, j);
                double *restrict pair = out + (k->n + p) * k->size + at, *restrict intra = out + i * k->size + at;
                for (int64_t b = 0; b < m; b++) pair[b] = exp64(paper_pair(s, p, x[b], y[b]));
                if (i == j)
                    for (int64_t b = 0; b < m; b++) intra[b] = exp64(paper_pair(s, p, x[b], x[b]) * tasks);
            }
    }
}

/* --- merging ------------------------------------------------------------------------------------------------------------------------ */

/* pcb.scale_of (for PAPER scale_of_paper) and pcb.combine of a strip with its scores -> merged [m]. */
INLINE void combine_strip(const Block *k, const Thresholds *s, int64_t question, int64_t m, const float *lambdas, float lambda, float floor_, float *restrict merged) {
    float total[STRIP], sum[STRIP];
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict x = tau_of(k, i);
        const float weight = lambdas[i];
        float scale[STRIP], term[STRIP];
        if (question == PAPER) {
            const double t = s->paper_t[i], *restrict beta = paper_beta_of(k, i);
            for (int64_t b = 0; b < m; b++) {
                scale[b] = beta[b] >= t ? (float)beta[b] : 0.0f;
                term[b] = (scale[b] * weight) * x[b];
            }
        } else {
            const float low = s->low[i], high = s->high[i], t = s->t[i], span = s->span[i], *restrict beta = beta_of(k, i);
            for (int64_t b = 0; b < m; b++) {
                scale[b] = ((beta[b] < t ? t : beta[b]) - t) / span;
                term[b] = (scale[b] * weight) * (sign(x[b]) * clamp(fabsf(x[b]), low, high));
            }
        }
        for (int64_t b = 0; b < m; b++) {
            total[b] = i == 0 ? scale[b] : total[b] + scale[b]; /* not 0 + scale, which would turn a first -0 into +0 */
            sum[b] = i == 0 ? term[b] : sum[b] + term[b];
        }
    }
    const float *restrict theta = theta_of(k);
    for (int64_t b = 0; b < m; b++) {
        float value = (sum[b] * lambda) / (total[b] < floor_ ? floor_ : total[b]) + theta[b];
        merged[b] = (total[b] > 0.0f) & (sum[b] != 0.0f) ? value : theta[b];
    }
}

/* pcb.ties of a strip -> merged [m]; low [n] is the smallest |tau| that is kept. */
INLINE void ties_strip(const Block *k, const Thresholds *s, int64_t m, const float *lambdas, float lambda, float *restrict merged) {
    float elected[STRIP], sum[STRIP], count[STRIP];
    for (int64_t b = 0; b < m; b++) elected[b] = sum[b] = count[b] = 0.0f;
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict x = tau_of(k, i);
        const float least = s->low[i];
        for (int64_t b = 0; b < m; b++) elected[b] += fabsf(x[b]) >= least ? x[b] : 0.0f;
    }
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict x = tau_of(k, i);
        const float least = s->low[i], weight = lambdas[i];
        for (int64_t b = 0; b < m; b++) {
            float agrees = elected[b] >= 0.0f ? x[b] : -x[b]; /* positive if x is not 0 and has the elected sign */
            int agree = (fabsf(x[b]) >= least) & (agrees > 0.0f);
            float term = agree ? x[b] * weight : 0.0f;
            sum[b] = i == 0 ? term : sum[b] + term; /* not 0 + term, which would turn a first -0 into +0 */
            count[b] += agree ? 1.0f : 0.0f;
        }
    }
    const float *restrict theta = theta_of(k);
    for (int64_t b = 0; b < m; b++) {
        float value = (sum[b] / (count[b] < 1.0f ? 1.0f : count[b])) * lambda + theta[b];
        merged[b] = count[b] > 0.0f ? value : theta[b];
    }
}

/* pcb.task_arithmetic, or pcb.linear with lambda the sum of the weights, of a strip -> merged [m]. */
INLINE void sum_strip(const Block *k, int64_t question, int64_t m, const float *lambdas, float lambda, float *restrict merged) {
    for (int64_t i = 0; i < k->n; i++) {
        const float *restrict x = tau_of(k, i);
        const float weight = lambdas[i];
        for (int64_t b = 0; b < m; b++) merged[b] = i == 0 ? x[b] * weight : merged[b] + x[b] * weight;
    }
    const float *restrict theta = theta_of(k);
    if (question == LINEAR)
        for (int64_t b = 0; b < m; b++) merged[b] = merged[b] / lambda;
    else
        for (int64_t b = 0; b < m; b++) merged[b] = merged[b] * lambda + theta[b];
}

/* The merged block, rounded once to bfloat16 (nearest, ties to even) or left in float32 -> out [size]; not 0 if any of it is not finite. */
EXPORT CLONES int64_t pcb_merge(const Block *k, const Thresholds *s, int64_t question, const float *lambdas, float lambda, float floor_, int64_t bfloat16, void *out) {
    uint32_t bad = 0;
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int64_t m = strip_at(k, at);
        float strip[STRIP], *restrict merged = bfloat16 ? strip : (float *)out + at;
        load_strip(k, at, m);
        if (question == TIES)
            ties_strip(k, s, m, lambdas, lambda, merged);
        else if (question == TASK_ARITHMETIC || question == LINEAR)
            sum_strip(k, question, m, lambdas, lambda, merged);
        else {
            beta_strip(k, s, question, m);
            combine_strip(k, s, question, m, lambdas, lambda, floor_, merged);
        }
        uint16_t *restrict rounded = (uint16_t *)out + at;
        if (bfloat16)
            for (int64_t b = 0; b < m; b++) {
                uint32_t bits = (uint32_t)as_bits(merged[b]), near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
                bad |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u) | (uint32_t)((near & 0x7f80u) == 0x7f80u);
                rounded[b] = (uint16_t)near;
            }
        else
            for (int64_t b = 0; b < m; b++) bad |= (uint32_t)((as_bits(merged[b]) & 0x7f800000) == 0x7f800000);
    }
    return (int64_t)bad;
}

/* --- basis -------------------------------------------------------------------------------------------------------------------------- */

/* C_i of a block -> out [n, size]: what the merge with the i-th unit vector adds to the base. Not 0 if any of it is not finite. */
EXPORT CLONES int64_t pcb_basis(const Block *k, const Thresholds *s, int64_t question, float floor_, float *out) {
    uint32_t bad = 0;
    for (int64_t at = 0; at < k->size; at += STRIP) {
        const int64_t m = strip_at(k, at);
        load_strip(k, at, m);
        for (int64_t b = 0; b < m; b++) theta_of(k)[b] = 0.0f;
        if (question != TIES && question != TASK_ARITHMETIC) beta_strip(k, s, question, m);
        for (int64_t i = 0; i < k->n; i++) {
            float unit[k->n], *restrict c = out + i * k->size + at;
            for (int64_t j = 0; j < k->n; j++) unit[j] = j == i ? 1.0f : 0.0f;
            if (question == TIES)
                ties_strip(k, s, m, unit, 1.0f, c);
            else if (question == TASK_ARITHMETIC)
                sum_strip(k, question, m, unit, 1.0f, c);
            else
                combine_strip(k, s, question, m, unit, 1.0f, floor_, c);
            for (int64_t b = 0; b < m; b++) bad |= (uint32_t)((as_bits(c[b]) & 0x7f800000) == 0x7f800000);
        }
    }
    return (int64_t)bad;
}

/* The entries of one task in a segment (basis.py): a bit per element, set where it has one, in whole strips; and the entries, in order, with room
   to read a vector beyond the last. The pointers move on as entries are read. */
typedef struct {
    const uint64_t *mask;
    const float *values;
    const void *scores; /* float, for `paper` double; NULL: the values are C_i */
} Sparse;

/* sum_i weights_i C_i of a strip -> sum [STRIP], task after task. */
static void weighted_sum(Sparse *tasks, int64_t n, const float *weights, float *restrict sum) {
    float x[STRIP];
    for (int64_t b = 0; b < STRIP; b++) sum[b] = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        Sparse *s = tasks + i;
        memset(x, 0, sizeof x); /* not straight into the sum: a load that may meet a recent store waits for it */
        for (int q = 0; q < STRIP; q += 64)
            for (uint64_t bits = *s->mask++; bits; bits &= bits - 1) x[q + __builtin_ctzll(bits)] = *s->values++;
        for (int64_t b = 0; b < STRIP; b++) sum[b] += x[b] * weights[i];
    }
}

/* scale_i and scale_i weight_i x_i of a strip, from the scores of its entries; as combine_strip has them. */
INLINE void expand_scored(Sparse *s, const Thresholds *known, int64_t paper, int64_t i, float weight, float *restrict scale, float *restrict term) {
    const float *v = s->values, *beta = s->scores;
    const double *beta64 = s->scores;
    for (int64_t b = 0; b < STRIP; b++) scale[b] = term[b] = 0.0f;
    for (int q = 0; q < STRIP; q += 64)
        for (uint64_t bits = *s->mask++; bits; bits &= bits - 1) {
            const int at = q + __builtin_ctzll(bits);
            float size;
            if (paper) {
                size = *beta64 >= known->paper_t[i] ? (float)*beta64 : 0.0f;
                beta64++;
            } else {
                size = ((*beta < known->t[i] ? known->t[i] : *beta) - known->t[i]) / known->span[i];
                beta++;
            }
            scale[at] = size;
            term[at] = (size * weight) * *v++;
        }
    s->values = v;
    s->scores = paper ? (const void *)beta64 : (const void *)beta;
}

/* How a merged value is put out: as float32, as bfloat16, or as float32 that holds what bfloat16 would. */
enum { WIDE, NARROW, ROUNDED };

INLINE uint16_t narrowed(float x) {
    uint32_t bits = (uint32_t)as_bits(x);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* theta + lambda sum (over total, if there is one) of the strip at `at`, rounded once -> out [m]; theta where there is nothing to add. */
INLINE void finish_strip(const void *base, int64_t at, int64_t m, const float *restrict sum, float lambda, const float *restrict total, float floor_,
                         void *out, const int base_bfloat16, const int as) {
    const uint16_t *restrict theta16 = (const uint16_t *)base + at;
    const float *restrict theta32 = (const float *)base + at;
    uint16_t *restrict out16 = out;
    float *restrict out32 = out;
    if (total)
        for (int64_t b = 0; b < m; b++) {
            const float theta = base_bfloat16 ? widened(theta16[b]) : theta32[b];
            const float value = (sum[b] * lambda) / (total[b] < floor_ ? floor_ : total[b]) + theta;
            const float merged = (total[b] > 0.0f) & (sum[b] != 0.0f) ? value : theta;
            if (as == NARROW) out16[b] = narrowed(merged);
            else out32[b] = as == ROUNDED ? widened(narrowed(merged)) : merged;
        }
    else
        for (int64_t b = 0; b < m; b++) {
            const float theta = base_bfloat16 ? widened(theta16[b]) : theta32[b];
            const float value = sum[b] * lambda + theta;
            const float merged = sum[b] != 0.0f ? value : theta;
            if (as == NARROW) out16[b] = narrowed(merged);
            else out32[b] = as == ROUNDED ? widened(narrowed(merged)) : merged;
        }
}

#ifdef __x86_64__
/* Where the processor can, 16 entries are spread over a vector in one instruction, 64 elements of all tasks are summed in registers, and the result goes
   past the caches, so that what was there is not fetched first. */
#define AVX512 __attribute__((target("avx512f,avx512bw,popcnt")))
enum { GROUP = 4 }; /* tasks at a time: what they have in a strip stays in the first-level cache */

/* x_k += weight * (entries of elements 16 k to 16 k + 15) for k < 4; where the entries of the next 64 elements begin. */
AVX512 INLINE const float *add_spread(uint64_t bits, const float *entries, float weight, const int weighed, __m512 x[4]) {
    for (int k = 0; k < 4; k++, bits >>= 16) {
        /* The target is a register that was just cleared: some processors wait for what it held before, five cycles instead of one, though all of it
           is replaced. The empty assembly keeps the compiler from taking any register, and from shifting in mask registers, which is slow. */
        uint32_t of_16 = (uint32_t)bits & 0xffff;
        __m512 wide = _mm512_setzero_ps();
        __asm__("" : "+v"(wide), "+r"(of_16));
        wide = _mm512_mask_expand_ps(wide, (__mmask16)of_16, _mm512_loadu_ps(entries));
        x[k] = _mm512_add_ps(x[k], weighed ? wide : _mm512_mul_ps(wide, _mm512_set1_ps(weight)));
        entries += __builtin_popcount(of_16);
    }
    return entries;
}

/* scale_i and scale_i weight_i x_i of a strip's entries, as expand_scored has them, and beyond them up to a whole vector; the task moves on. */
AVX512 INLINE Sparse weighed(Sparse *s, const Thresholds *known, int64_t paper, int64_t i, float weight, float *restrict scale, float *restrict term) {
    const Sparse result = {s->mask, term, scale};
    const float *v = s->values, *beta = s->scores, t = paper ? 0.0f : known->t[i], span = paper ? 1.0f : known->span[i];
    const double *beta64 = s->scores;
    int64_t count = 0;
    for (int q = 0; q < STRIP / 64; q++) count += __builtin_popcountll(*s->mask++);
    for (int64_t e = 0; e < count; e += 16)
        for (int64_t b = e; b < e + 16; b++) {
            if (paper) scale[b] = beta64[b] >= known->paper_t[i] ? (float)beta64[b] : 0.0f;
            else scale[b] = ((beta[b] < t ? t : beta[b]) - t) / span;
            term[b] = (scale[b] * weight) * v[b];
        }
    s->values += count;
    s->scores = paper ? (const void *)(beta64 + count) : (const void *)(beta + count);
    return result;
}

/* 64 elements of `count` tasks, added to sum (and total). */
AVX512 INLINE void add_64(Sparse *s, const int count, const float *weights, const int scored, __m512 sum[4], __m512 total[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
        const uint64_t bits = *s[j].mask++;
        if (scored) s[j].scores = add_spread(bits, s[j].scores, 1.0f, 1, total);
        else _mm_prefetch((const char *)(s[j].values + 256), _MM_HINT_T0);
        s[j].values = add_spread(bits, s[j].values, weights[j], scored, sum);
    }
}

/* finish_strip of 16 elements: the merged values, as float32. */
AVX512 INLINE __m512 finish(__m512 theta, __m512 sum, __m512 total, float lambda, float floor_, const int scored) {
    const __m512 zero = _mm512_setzero_ps(), scaled = _mm512_mul_ps(sum, _mm512_set1_ps(lambda));
    const __m512 change = scored ? _mm512_div_ps(scaled, _mm512_max_ps(total, _mm512_set1_ps(floor_))) : scaled;
    const __mmask16 changed = _mm512_cmp_ps_mask(sum, zero, _CMP_NEQ_UQ) & (scored ? _mm512_cmp_ps_mask(total, zero, _CMP_GT_OQ) : 0xffff);
    return _mm512_mask_add_ps(theta, changed, change, theta);
}

/* `narrowed` of 16 elements, in the upper half of each. */
AVX512 INLINE __m512i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}

AVX512 INLINE void put(void *to, __m512i x) {
    if ((uintptr_t)to % 64 == 0) _mm512_stream_si512(to, x);
    else _mm512_storeu_si512(to, x);
}

/* 64 elements from base and sums. */
AVX512 INLINE void finish_64(const void *base, const __m512 sum[4], const __m512 total[4], float lambda, float floor_, void *out, const int scored,
                             const int base_bfloat16, const int as) {
    __m512 merged[4];
    for (int k = 0; k < 4; k++) {
        const __m512i wide = base_bfloat16 ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)base + k)), 16)
                                           : _mm512_loadu_si512((const __m512i *)base + k);
        merged[k] = finish(_mm512_castsi512_ps(wide), sum[k], total[k], lambda, floor_, scored);
    }
    if (as == NARROW) {
        const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13,
                                               11, 9, 7, 5, 3, 1);
        for (int k = 0; k < 4; k += 2)
            put((__m512i *)out + k / 2, _mm512_permutex2var_epi16(narrow(merged[k]), upper, narrow(merged[k + 1])));
    } else
        for (int k = 0; k < 4; k++) {
            const __m512i bits = _mm512_castps_si512(merged[k]);
            put((__m512i *)out + k, as == ROUNDED ? _mm512_and_si512(narrow(merged[k]), _mm512_set1_epi32((int)0xffff0000)) : bits);
        }
}

AVX512 INLINE void apply_as(const void *base, int64_t size, Sparse *tasks, int64_t n, const float *weights, float lambda, const Thresholds *known,
                            int64_t paper, float floor_, void *out, const int scored, const int base_bfloat16, const int as) {
    const int64_t read_size = base_bfloat16 ? 2 : 4, write_size = as == NARROW ? 2 : 4;
    float scales[GROUP][STRIP + 16], terms[GROUP][STRIP + 16];
    __m512 so_far[STRIP / 64][8]; /* sums and totals of the groups before */
    for (int64_t strip = 0; strip < size; strip += STRIP)
        for (int64_t i = 0; i < n; i += GROUP) {
            Sparse of_group[GROUP], *s = tasks + i;
            const int64_t count = n - i < GROUP ? n - i : GROUP;
            if (scored) {
                s = of_group;
                for (int64_t j = 0; j < count; j++) s[j] = weighed(tasks + i + j, known, paper, i + j, weights[i + j], scales[j], terms[j]);
            }
            for (int64_t at = strip; at < size && at < strip + STRIP; at += 64) {
                __m512 sum[4], total[4], *before = so_far[(at - strip) / 64];
                for (int k = 0; k < 4; k++) sum[k] = _mm512_set1_ps(-0.0f), total[k] = _mm512_setzero_ps(); /* -0 + x is x */
                for (int k = 0; k < 4 && i; k++) sum[k] = before[k], total[k] = before[4 + k];
                if (count == 4) add_64(s, 4, weights + i, scored, sum, total);
                else if (count == 3) add_64(s, 3, weights + i, scored, sum, total);
                else if (count == 2) add_64(s, 2, weights + i, scored, sum, total);
                else add_64(s, 1, weights + i, scored, sum, total);
                if (i + count < n) {
                    for (int k = 0; k < 4; k++) before[k] = sum[k], before[4 + k] = total[k];
                    continue;
                }
                const char *from = (const char *)base + at * read_size;
                char *to = (char *)out + at * write_size;
                /* What the processor foresees by itself ends with each page of memory. */
                for (int64_t line = 0; line < 64 * read_size; line += 64) _mm_prefetch(from + 4 * STRIP * read_size + line, _MM_HINT_T0);
                if (size - at >= 64) {
                    finish_64(from, sum, total, lambda, floor_, to, scored, base_bfloat16, as);
                    continue;
                }
                char last[256], merged[256];
                memcpy(last, from, (size - at) * read_size);
                finish_64(last, sum, total, lambda, floor_, merged, scored, base_bfloat16, as);
                memcpy(to, merged, (size - at) * write_size);
            }
        }
    _mm_sfence();
}

AVX512 static void apply_avx512(const void *base, int64_t base_bfloat16, int64_t size, Sparse *tasks, int64_t n, const float *weights, float lambda,
                                const Thresholds *known, int64_t paper, float floor_, int64_t as, void *out) {
#define APPLY(scored, base_bfloat16, as) \
    apply_as(base, size, tasks, n, weights, lambda, known, paper, floor_, out, scored, base_bfloat16, as)
#define APPLY_TO(scored, base_bfloat16) \
    if (as == NARROW) APPLY(scored, base_bfloat16, NARROW); \
    else if (as == ROUNDED) APPLY(scored, base_bfloat16, ROUNDED); \
    else APPLY(scored, base_bfloat16, WIDE);
    if (known && base_bfloat16) { APPLY_TO(1, 1) }
    else if (known) { APPLY_TO(1, 0) }
    else if (base_bfloat16) { APPLY_TO(0, 1) }
    else { APPLY_TO(0, 0) }
#undef APPLY_TO
#undef APPLY
}
#endif

EXPORT int pcb_avx512 = 1; /* 0: as on a processor without it, for the tests */

/* theta + lambda sum_i weights_i C_i of a segment of `size` elements, or with scores what combine_strip gives, rounded once -> out; `as` says how. */
EXPORT CLONES void pcb_apply(const void *base, int64_t base_bfloat16, int64_t size, Sparse *tasks, int64_t n, const float *weights, float lambda,
                             const Thresholds *known, int64_t paper, float floor_, int64_t as, void *out) {
#ifdef __x86_64__
    if (pcb_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
        apply_avx512(base, base_bfloat16, size, tasks, n, weights, lambda, known, paper, floor_, as, out);
        return;
    }
#endif
    const int64_t write_size = as == NARROW ? 2 : 4;
    for (int64_t at = 0; at < size; at += STRIP) {
        const int64_t m = size - at < STRIP ? size - at : STRIP;
        float sum[STRIP], total[STRIP], x[STRIP], scale[STRIP];
        union { float of32[STRIP]; uint16_t of16[STRIP]; } merged;
        if (!known) weighted_sum(tasks, n, weights, sum);
        for (int64_t i = 0; known && i < n; i++) {
            expand_scored(tasks + i, known, paper, i, weights[i], scale, x);
            for (int64_t b = 0; b < STRIP; b++) total[b] = i == 0 ? scale[b] : total[b] + scale[b];
            for (int64_t b = 0; b < STRIP; b++) sum[b] = i == 0 ? x[b] : sum[b] + x[b];
        }
        if (base_bfloat16) finish_strip(base, at, m, sum, lambda, known ? total : NULL, floor_, &merged, 1, as);
        else finish_strip(base, at, m, sum, lambda, known ? total : NULL, floor_, &merged, 0, as);
        memcpy((char *)out + at * write_size, &merged, m * write_size);
    }
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Native kernels of pcb_ray, called through ctypes.", -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
