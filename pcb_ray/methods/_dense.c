/* Dense linear algebra in float64 whose bits depend on nothing but its operands: not on the width of the vector unit, nor on how the work is
   cut, nor on a library's version. Every sum is taken in one stated order, every operation is rounded on its own (compile with
   -ffp-contract=off), and what is vectorised is always a run of sums that do not depend on each other.

   Plain C, called through ctypes: no Python object is touched, and the interpreter lock is free meanwhile. */

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define HAS_VARIANTS 1
#else
#define CLONES
#define HAS_VARIANTS 0
#endif

/* --- products ------------------------------------------------------------------------------------------------------------------------------ */

/* A tile of C has TALL rows and two vectors of columns; DEEP terms are added to it at a time, of HIGH rows and BROAD columns that are packed. */
enum { TALL = 6, DEEP = 256, HIGH = 96, BROAD = 1536, WIDEST = 16 };

/* C [TALL, 2 vectors] += A [DEEP, TALL] B [DEEP, 2 vectors], a term after another. */
#define TILE(NAME, TARGET, BYTES)                                                                                                           \
    typedef double NAME##_v __attribute__((vector_size(BYTES), aligned(8)));                                                                \
    TARGET static void NAME(int64_t depth, const double *a, const double *b, double *c, int64_t step) {                                     \
        enum { LANES = BYTES / 8 };                                                                                                         \
        NAME##_v sum[TALL][2];                                                                                                              \
        for (int i = 0; i < TALL; i++)                                                                                                      \
            for (int j = 0; j < 2; j++) sum[i][j] = *(const NAME##_v *)(c + i * step + j * LANES);                                          \
        for (int64_t k = 0; k < depth; k++, a += TALL, b += 2 * LANES) {                                                                    \
            NAME##_v left = *(const NAME##_v *)b, right = *(const NAME##_v *)(b + LANES);                                                   \
            for (int i = 0; i < TALL; i++) {                                                                                                \
                sum[i][0] += left * a[i];                                                                                                   \
                sum[i][1] += right * a[i];                                                                                                  \
            }                                                                                                                               \
        }                                                                                                                                   \
        for (int i = 0; i < TALL; i++)                                                                                                      \
            for (int j = 0; j < 2; j++) *(NAME##_v *)(c + i * step + j * LANES) = sum[i][j];                                                \
    }

typedef void (*Tile)(int64_t, const double *, const double *, double *, int64_t);

#if HAS_VARIANTS
TILE(tile_v4, __attribute__((target("arch=x86-64-v4"))), 64)
TILE(tile_v3, __attribute__((target("arch=x86-64-v3"))), 32)
#endif
TILE(tile_default, , 16)

static Tile chosen_tile(int64_t *width) {
#if HAS_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) { *width = 16; return tile_v4; }
    if (__builtin_cpu_supports("x86-64-v3")) { *width = 8; return tile_v3; }
#endif
    *width = 4;
    return tile_default;
}

/* A matrix: element (i, j) lies at i * down + j * along. */
typedef struct {
    const void *data;
    int64_t is_double, down, along;
} Matrix;

INLINE double element(const Matrix *x, int64_t i, int64_t j) {
    int64_t at = i * x->down + j * x->along;
    return x->is_double ? ((const double *)x->data)[at] : (double)((const float *)x->data)[at];
}

/* Terms first..first+depth-1 of rows at..at+count-1 of x are packed in slivers of `width` rows, the last one filled up with zeros. */
static void pack(double *out, const Matrix *x, int64_t at, int64_t count, int64_t first, int64_t depth, int64_t width) {
    for (int64_t sliver = 0; sliver < count; sliver += width) {
        int64_t full = count - sliver < width ? count - sliver : width;
        if (full < width) memset(out, 0, sizeof(double) * depth * width);
        if (x->down == 1 && full == width) { /* neighbours in a row of the sliver are neighbours in memory */
            for (int64_t k = 0; k < depth; k++) {
                int64_t from = at + sliver + (first + k) * x->along;
                if (x->is_double)
                    memcpy(out + k * width, (const double *)x->data + from, sizeof(double) * width);
                else
                    for (int64_t i = 0; i < width; i++) out[k * width + i] = (double)((const float *)x->data)[from + i];
            }
        } else {
            for (int64_t i = 0; i < full; i++)
                for (int64_t k = 0; k < depth; k++) out[k * width + i] = element(x, at + sliver + i, first + k);
        }
        out += depth * width;
    }
}


/* C [m, n] += A [m, k] B^T, B [n, k]: each element of C is added to, a term after another in the order of k. With `lower` only those tiles that
   reach the diagonal or lie below it are right, the others are undefined. */
EXPORT int64_t pcb_product(double *c, int64_t step, int64_t m, int64_t n, int64_t k, const Matrix *a, const Matrix *b, int64_t lower) {
    int64_t width;
    Tile tile = chosen_tile(&width);
    double *work = aligned_alloc(64, sizeof(double) * (HIGH + BROAD) * DEEP);
    if (work == NULL) return 1;
    double *packed_a = work, *packed_b = work + HIGH * DEEP, edge[TALL * WIDEST];
    for (int64_t column = 0; column < n; column += BROAD) {
        int64_t columns = n - column < BROAD ? n - column : BROAD;
        for (int64_t term = 0; term < k; term += DEEP) {
            int64_t depth = k - term < DEEP ? k - term : DEEP;
            pack(packed_b, b, column, columns, term, depth, width);
            for (int64_t row = 0; row < m; row += HIGH) {
                int64_t rows = m - row < HIGH ? m - row : HIGH;
                if (lower && row + rows <= column) continue;
                pack(packed_a, a, row, rows, term, depth, TALL);
                for (int64_t j = 0; j < columns; j += width) {
                    if (lower && row + rows <= column + j) break;
                    int64_t broad = columns - j < width ? columns - j : width;
                    for (int64_t i = 0; i < rows; i += TALL) {
                        int64_t tall = rows - i < TALL ? rows - i : TALL;
                        if (lower && row + i + tall <= column + j) continue;
                        double *out = c + (row + i) * step + column + j;
                        const double *of_a = packed_a + i * depth, *of_b = packed_b + j * depth;
                        if (tall == TALL && broad == width) {
                            tile(depth, of_a, of_b, out, step);
                            continue;
                        }
                        memset(edge, 0, sizeof edge);
                        for (int64_t p = 0; p < tall; p++) memcpy(edge + p * width, out + p * step, sizeof(double) * broad);
                        tile(depth, of_a, of_b, edge, width);
                        for (int64_t p = 0; p < tall; p++) memcpy(out + p * step, edge + p * width, sizeof(double) * broad);
                    }
                }
            }
        }
    }
    free(work);
    return 0;
}

/* --- sums of products ------------------------------------------------------------------------------------------------------------------------ */

enum { LANES = 16 };

/* sum_i x_i y_i: LANES sums of every LANES-th term, then these in halves. */
CLONES static double dot(const double *x, const double *y, int64_t n) {
    double lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int p = 0; p < LANES; p++) lane[p] += x[i + p] * y[i + p];
    for (int p = 0; i + p < n; p++) lane[p] += x[i + p] * y[i + p];
    for (int half = LANES / 2; half; half /= 2)
        for (int p = 0; p < half; p++) lane[p] += lane[p + half];
    return lane[0];
}

/* y += a x */
CLONES static void add_scaled(double *y, const double *x, double a, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i] * a;
}

/* out_i = x_i y_i^T of rows of two matrices [m, n]. */
EXPORT void pcb_row_products(double *out, const double *x, const double *y, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i++) out[i] = dot(x + i * n, y + i * n, n);
}

/* --- positive definite systems --------------------------------------------------------------------------------------------------------------- */

enum { BLOCK = 64 };

/* A [n, n], symmetric and positive definite -> L below and on its diagonal, with A = L L^T; what lies above is undefined. Returns 1 if memory is
   short, 2 if A is not positive definite. `turned` is [BLOCK, n]. */
static int64_t cholesky(double *a, int64_t n, double *turned) {
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t stop = first + BLOCK < n ? first + BLOCK : n, count = stop - first;
        for (int64_t i = first; i < n; i++) /* these columns as rows: [count, n - first] */
            for (int64_t k = first; k < stop; k++) turned[(k - first) * n + i] = k > i ? 0.0 : a[i * n + k];
        for (int64_t k = first; k < stop; k++) {
            double *column = turned + (k - first) * n;
            for (int64_t p = first; p < k; p++) add_scaled(column + k, turned + (p - first) * n + k, -turned[(p - first) * n + k], n - k);
            if (!(column[k] > 0.0)) return 2;
            double root = sqrt(column[k]);
            for (int64_t i = k; i < n; i++) column[i] /= root;
        }
        for (int64_t i = first; i < n; i++)
            for (int64_t k = first; k < stop && k <= i; k++) a[i * n + k] = turned[(k - first) * n + i];
        if (stop == n) break;
        int64_t size = n - stop;
        double *negative = malloc(sizeof(double) * count * size);
        if (negative == NULL) return 1;
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = 0; i < size; i++) negative[k * size + i] = -turned[k * n + stop + i];
        Matrix left = {negative, 1, 1, size}, right = {turned + stop, 1, 1, n};
        int64_t failed = pcb_product(a + stop * n + stop, n, size, size, count, &left, &right, 1);
        free(negative);
        if (failed) return failed;
    }
    return 0;
}

/* A^-1 B for A [n, n], symmetric and positive definite, overwritten, and B [n, m], which becomes the result. Returns as `cholesky` does. */
EXPORT int64_t pcb_solve(double *a, double *b, int64_t n, int64_t m) {
    double *turned = malloc(sizeof(double) * BLOCK * n), *l = malloc(sizeof(double) * BLOCK * n);
    int64_t failed = turned == NULL || l == NULL ? 1 : cholesky(a, n, turned);
    free(turned);
    for (int64_t first = 0; first < n && !failed; first += BLOCK) { /* L Y = B */
        int64_t stop = first + BLOCK < n ? first + BLOCK : n, count = stop - first;
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < first; k++) l[i * n + k] = -a[(first + i) * n + k];
        Matrix left = {l, 1, n, 1}, right = {b, 1, 1, m};
        failed = pcb_product(b + first * m, m, count, m, first, &left, &right, 0);
        for (int64_t i = first; i < stop; i++) {
            for (int64_t k = first; k < i; k++) add_scaled(b + i * m, b + k * m, -a[i * n + k], m);
            for (int64_t j = 0; j < m; j++) b[i * m + j] /= a[i * n + i];
        }
    }
    for (int64_t first = (n - 1) / BLOCK * BLOCK; first >= 0 && !failed; first -= BLOCK) { /* L^T X = Y */
        int64_t stop = first + BLOCK < n ? first + BLOCK : n, count = stop - first;
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = stop; k < n; k++) l[i * n + k - stop] = -a[k * n + first + i];
        Matrix left = {l, 1, n, 1}, right = {b + stop * m, 1, 1, m};
        failed = pcb_product(b + first * m, m, count, m, n - stop, &left, &right, 0);
        for (int64_t i = stop - 1; i >= first; i--) {
            for (int64_t k = i + 1; k < stop; k++) add_scaled(b + i * m, b + k * m, -a[k * n + i], m);
            for (int64_t j = 0; j < m; j++) b[i * m + j] /= a[i * n + i];
        }
    }
    free(l);
    return failed;
}

/* --- eigenvalues and -vectors of a symmetric matrix ---------------------------------------------------------------------------------------- */

enum { PANEL = 32 };

/* y [n] = A v of a symmetric A [n, n], term after term. */
CLONES static void symmetric_times(double *restrict y, const double *restrict a, int64_t step, const double *restrict v, int64_t n) {
    enum { AT_ONCE = 8, STRIP = 512 };
    for (int64_t strip = 0; strip < n; strip += STRIP) { /* y stays in the first-level cache */
        int64_t stop = n - strip < STRIP ? n : strip + STRIP, j = 0;
        for (int64_t i = strip; i < stop; i++) y[i] = 0.0;
        for (; j + AT_ONCE <= n; j += AT_ONCE) {
            const double *r = a + j * step;
            for (int64_t i = strip; i < stop; i++) {
                double sum = y[i];
                for (int p = 0; p < AT_ONCE; p++) sum += r[p * step + i] * v[j + p];
                y[i] = sum;
            }
        }
        for (; j < n; j++)
            for (int64_t i = strip; i < stop; i++) y[i] += a[j * step + i] * v[j];
    }
}

/* A [n, n] symmetric, overwritten -> T tridiagonal with A = Q T Q^T: its diagonal d [n], what is beside it e [n] (the last is 0); of reflector
   k, I - tau_k v v^T, row k of `reflectors` [n, n] holds v, from place k + 1 on, where it is 1.

   Householder's method in panels (Dongarra, Hammarling, Sorensen, Block reduction of matrices to condensed forms, 1989): the two-sided update of
   a panel is one product. V and W are [PANEL, n], a row for each reflector. */
static int64_t tridiagonal(double *a, int64_t n, double *d, double *e, double *tau, double *reflectors, double *w) {
    memset(reflectors, 0, sizeof(double) * n * n);
    for (int64_t first = 0; first < n; first += PANEL) {
        int64_t stop = first + PANEL < n ? first + PANEL : n;
        for (int64_t k = first; k < stop; k++) {
            double *column = a + k * n; /* row k: A is symmetric, and only this row of the panel is brought up to date */
            for (int64_t p = first; p < k; p++) {
                const double *v_p = reflectors + p * n, *w_p = w + (p - first) * n;
                add_scaled(column + k, v_p + k, -w_p[k], n - k);
                add_scaled(column + k, w_p + k, -v_p[k], n - k);
            }
            d[k] = column[k];
            e[k] = tau[k] = 0.0;
            double *w_k = w + (k - first) * n;
            memset(w_k, 0, sizeof(double) * n);
            if (k + 1 == n) continue;
            double *v = reflectors + k * n, alpha = column[k + 1];
            int64_t at = k + 1, size = n - at;
            double beyond = dot(column + at + 1, column + at + 1, size - 1);
            if (beyond == 0.0) { /* nothing to remove */
                e[k] = alpha;
                continue;
            }
            double beta = -copysign(sqrt(alpha * alpha + beyond), alpha), scale = 1.0 / (alpha - beta);
            e[k] = beta;
            tau[k] = (beta - alpha) / beta;
            v[at] = 1.0;
            for (int64_t i = at + 1; i < n; i++) v[i] = column[i] * scale;
            symmetric_times(w_k + at, a + at * n + at, n, v + at, size);
            for (int64_t p = first; p < k; p++) {
                const double *v_p = reflectors + p * n, *w_p = w + (p - first) * n;
                add_scaled(w_k + at, v_p + at, -dot(w_p + at, v + at, size), size);
                add_scaled(w_k + at, w_p + at, -dot(v_p + at, v + at, size), size);
            }
            for (int64_t i = at; i < n; i++) w_k[i] *= tau[k];
            add_scaled(w_k + at, v + at, -0.5 * tau[k] * dot(w_k + at, v + at, size), size);
        }
        if (stop == n) break;
        int64_t size = n - stop, count = stop - first; /* A -= V^T W + W^T V: in one product, of [-V; -W] and [W; V] */
        double *negative = malloc(sizeof(double) * 2 * count * size), *other = malloc(sizeof(double) * 2 * count * size);
        if (negative == NULL || other == NULL) {
            free(negative);
            free(other);
            return 1;
        }
        for (int64_t p = 0; p < count; p++) {
            const double *v_p = reflectors + (first + p) * n + stop, *w_p = w + p * n + stop;
            for (int64_t i = 0; i < size; i++) {
                negative[2 * p * size + i] = -v_p[i];
                negative[(2 * p + 1) * size + i] = -w_p[i];
            }
            memcpy(other + 2 * p * size, w_p, sizeof(double) * size);
            memcpy(other + (2 * p + 1) * size, v_p, sizeof(double) * size);
        }
        Matrix left = {negative, 1, 1, size}, right = {other, 1, 1, size};
        int64_t failed = pcb_product(a + stop * n + stop, n, size, size, 2 * count, &left, &right, 0);
        free(negative);
        free(other);
        if (failed) return failed;
    }
    return 0;
}

/* Q^T [n, n] from its reflectors, in blocks of PANEL: Q = H_0 H_1 ... , and a block of reflectors is I - V^T S V with V [PANEL, n], S upper
   triangular (Schreiber, Van Loan, A storage-efficient WY representation, 1989). Q^T's row i is what becomes eigenvector i. */
static int64_t transposed_q(double *q, const double *reflectors, const double *tau, int64_t n) {
    double *s = malloc(sizeof(double) * PANEL * PANEL), *x = malloc(sizeof(double) * PANEL * n), *y = malloc(sizeof(double) * PANEL * n);
    int64_t failed = s == NULL || x == NULL || y == NULL;
    memset(q, 0, sizeof(double) * n * n);
    for (int64_t i = 0; i < n; i++) q[i * n + i] = 1.0;
    for (int64_t first = (n - 1) / PANEL * PANEL; first >= 0 && !failed; first -= PANEL) {
        int64_t count = first + PANEL < n ? PANEL : n - first;
        const double *v = reflectors + first * n;
        memset(s, 0, sizeof(double) * PANEL * PANEL);
        for (int64_t k = 0; k < count; k++) { /* S[:k, k] = -tau_k S[:k, :k] V[:k] v_k */
            double inner[PANEL];
            for (int64_t p = 0; p < k; p++) inner[p] = dot(v + p * n + first, v + k * n + first, n - first);
            for (int64_t p = 0; p < k; p++) {
                double sum = 0.0;
                for (int64_t r = p; r < k; r++) sum += s[p * PANEL + r] * inner[r];
                s[p * PANEL + k] = -tau[first + k] * sum;
            }
            s[k * PANEL + k] = tau[first + k];
        }
        /* Q^T = Q^T (I - V^T S^T V), where rows and columns before `first` are still those of I: X = V Q (transposed), Y = S X, Q^T -= Y^T V */
        int64_t size = n - first;
        memset(x, 0, sizeof(double) * PANEL * n);
        Matrix of_v = {v + first, 1, n, 1}, of_q = {q + first * n + first, 1, n, 1};
        failed = pcb_product(x, n, count, size, size, &of_v, &of_q, 0);
        for (int64_t p = 0; p < count; p++) {
            memset(y + p * n, 0, sizeof(double) * size);
            for (int64_t r = p; r < count; r++) add_scaled(y + p * n, x + r * n, -s[p * PANEL + r], size);
        }
        Matrix of_y = {y, 1, 1, n}, by_v = {v + first, 1, 1, n};
        failed = failed || pcb_product(q + first * n + first, n, size, size, count, &of_y, &by_v, 0);
    }
    free(s);
    free(x);
    free(y);
    return failed;
}

/* Rotations of one sweep: of rows i and i + 1, from i = last down to i = first. */
typedef struct {
    int64_t first, last;
    const double *c, *s; /* by i */
} Sweep;

enum { WAVE = 8, STRIPE = 64 };

INLINE void rotate(double *restrict upper, double *restrict lower, double c, double s) {
    for (int64_t j = 0; j < STRIPE; j++) {
        double x = upper[j], y = lower[j];
        lower[j] = s * x + c * y;
        upper[j] = c * x - s * y;
    }
}

/* Apply sweeps to rows of z [n, STRIPE]. Several go along together, each two rows behind the one before, so that a row is fetched once for all of
   them; of each row the rotations come in the same order as if one sweep came after the other. */
CLONES static void apply_sweeps(double *z, int64_t step, const Sweep *sweeps, int64_t count) {
    for (int64_t wave = 0; wave < count; wave += WAVE) {
        int64_t of_wave = count - wave < WAVE ? count - wave : WAVE, top = INT64_MIN, bottom = INT64_MAX;
        for (int64_t p = 0; p < of_wave; p++) {
            if (sweeps[wave + p].last - 2 * p > top) top = sweeps[wave + p].last - 2 * p;
            if (sweeps[wave + p].first - 2 * p < bottom) bottom = sweeps[wave + p].first - 2 * p;
        }
        for (int64_t at = top; at >= bottom; at--)
            for (int64_t p = 0; p < of_wave; p++) {
                const Sweep *one = sweeps + wave + p;
                int64_t i = at + 2 * p;
                if (i >= one->first && i <= one->last) rotate(z + i * step, z + (i + 1) * step, one->c[i], one->s[i]);
            }
    }
}

static void apply_to_all(double *z, int64_t n, const Sweep *sweeps, int64_t count, double *stripe) {
    for (int64_t column = 0; column < n; column += STRIPE) {
        int64_t columns = n - column < STRIPE ? n - column : STRIPE;
        for (int64_t i = 0; i < n; i++) memcpy(stripe + i * STRIPE, z + i * n + column, sizeof(double) * columns);
        apply_sweeps(stripe, STRIPE, sweeps, count);
        for (int64_t i = 0; i < n; i++) memcpy(z + i * n + column, stripe + i * STRIPE, sizeof(double) * columns);
    }
}

enum { AT_MOST = 60, KEPT = 64 };

/* Implicit QL with Wilkinson's shift (Dubrulle, Martin, Wilkinson, The implicit QL algorithm, 1968) on a matrix of norm about 1. d becomes the
   eigenvalues, in no order; rows of z, [n, n], become the vectors, unless it is NULL. */
static int64_t implicit_ql(double *d, double *e, double *z, int64_t n) {
    double *c = malloc(sizeof(double) * KEPT * n), *s = malloc(sizeof(double) * KEPT * n);
    double *stripe = aligned_alloc(64, sizeof(double) * STRIPE * n);
    Sweep sweeps[KEPT];
    int64_t count = 0, failed = c == NULL || s == NULL || stripe == NULL;
    if (!failed) memset(stripe, 0, sizeof(double) * STRIPE * n);
    for (int64_t l = 0; l < n && !failed; l++) {
        for (int64_t tries = 0;; tries++) {
            int64_t m = l;
            while (m < n - 1 && fabs(e[m]) > 0x1p-53) m++;
            if (m == l) break;
            if (tries == AT_MOST) { failed = 2; break; }
            double g = (d[l + 1] - d[l]) / (2.0 * e[l]), r = sqrt(g * g + 1.0);
            g = d[m] - d[l] + e[l] / (g + copysign(r, g));
            double sine = 1.0, cosine = 1.0, p = 0.0;
            Sweep *now = sweeps + count;
            *now = (Sweep){l, m - 1, c + count * n, s + count * n};
            double *of_c = c + count * n, *of_s = s + count * n;
            int64_t i = m - 1;
            for (; i >= l; i--) {
                double f = sine * e[i], b = cosine * e[i];
                r = sqrt(f * f + g * g);
                e[i + 1] = r;
                if (r == 0.0) {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    break;
                }
                sine = f / r;
                cosine = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * sine + 2.0 * cosine * b;
                p = sine * r;
                d[i + 1] = g + p;
                g = cosine * r - b;
                of_c[i] = cosine;
                of_s[i] = sine;
            }
            if (i >= l) {
                now->first = i + 1;
            } else {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
            if (++count == KEPT) {
                if (z != NULL) apply_to_all(z, n, sweeps, count, stripe);
                count = 0;
            }
        }
    }
    if (!failed && count && z != NULL) apply_to_all(z, n, sweeps, count, stripe);
    free(c);
    free(s);
    free(stripe);
    return failed;
}

/* a [n, n], symmetric, overwritten: eigenvalues d [n] and in the rows of z [n, n], unless it is NULL, their vectors, in no order. The largest element of `a` must be
   about 1. Returns 0, 1 if memory is short, 2 if the iteration does not converge, which nobody has seen. */
EXPORT int64_t pcb_eigen(double *a, int64_t n, double *d, double *z) {
    double *e = malloc(sizeof(double) * n), *tau = malloc(sizeof(double) * n), *w = malloc(sizeof(double) * PANEL * n);
    double *reflectors = malloc(sizeof(double) * n * n);
    int64_t failed = e == NULL || tau == NULL || w == NULL || reflectors == NULL;
    failed = failed || tridiagonal(a, n, d, e, tau, reflectors, w);
    if (!failed && z != NULL) failed = transposed_q(z, reflectors, tau, n);
    free(reflectors);
    if (!failed) failed = implicit_ql(d, e, z, n);
    free(e);
    free(tau);
    free(w);
    return failed;
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_dense", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__dense(void) { return PyModule_Create(&module); }
