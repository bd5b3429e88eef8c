/* Linear combinations and inner products of pieces of checkpoints, in float64, without the GIL.
 *
 * The same numbers as `Combiner` and `Products` of kernels.py, whose every step is a pass over the memory and which need
 * torch; here a chunk is read, summed and rounded while it is in the L1 cache. Plain loops that compilers vectorise.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* a fused multiply-add would give other bits than separate operations */
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
/* One copy for each level of vector instructions; the loader picks. */
#if !defined(__x86_64__) || !defined(__GLIBC__)
#define VECTORISED
#elif !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif !defined(__clang__) || __clang_major__ >= 14
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

enum { CHUNK = 1024, LANES = 16, MOST = 4096 };
enum { ROW_WORDS = 128, ROWS = 256 }; /* of a piece's checksum matrix of 64-bit words */
enum dtype { BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DTYPES };

static const Py_ssize_t itemsize[DTYPES] = {2, 2, 4, 8};

INLINE double as_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint64_t double_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_bfloat16(uint16_t half) { return as_float((uint32_t)half << 16); }

INLINE float from_float16(uint16_t half) {
    uint32_t bits = half, exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
    /* With the exponent's bias 127 instead of 15; a NaN's and an infinity's exponent is 255 instead of 31. */
    uint32_t normal = (exponent + (exponent == 31 ? 224 : 112)) << 23 | fraction << 13;
    uint32_t small = float_bits((float)(int32_t)fraction * 0x1p-24f);
    return as_float((bits & 0x8000) << 16 | (exponent == 0 ? small : normal));
}

/* To the nearest number with `bits` significant bits between 2**lowest and 2**(highest + 1), ties to even, below 2**lowest
 * to the spacing there: adds and subtracts a number so large that just the right bits survive. A zero comes out positive. */
INLINE double rounded(double wide, int bits, int lowest, int highest) {
    double power = as_double(double_bits(wide) & 0x7FF0000000000000u), shift = 1.5 * (double)(1ull << (53 - bits));
    const double least = as_double((uint64_t)(1023 + lowest) << 52), most = as_double((uint64_t)(1024 + highest) << 52);
    power = power < least ? least : power;
    power = power > most ? most : power;
    double addend = power * shift;
    return (wide + addend) - addend;
}

INLINE uint16_t to_bfloat16(float exact) { return (uint16_t)(float_bits(exact) >> 16); }

INLINE uint16_t to_float16(float exact) {
    uint32_t bits = float_bits(exact), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    float absolute = as_float(magnitude);
    uint32_t small = (uint32_t)(int32_t)((absolute < 0x1p-14f ? absolute : 0) * 0x1p24f);
    uint32_t half = magnitude < 0x38800000 ? small : (magnitude - 0x38000000) >> 13;
    half = magnitude >= 0x47800000 ? 0x7C00 : half;
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    return (uint16_t)(sign | half);
}

/* total = row · coefficient, or total += row · coefficient. */
INLINE void accumulate(double *total, const char *row, enum dtype dtype, int count, double coefficient, int first) {
    float narrow[CHUNK];
    const uint16_t *halves = (const uint16_t *)row;
    const float *singles = dtype == FLOAT32 ? (const float *)row : narrow;
    const double *doubles = (const double *)row;
    /* One step at a time: compilers make little of 16 bits that become 64 in one loop. */
    if (dtype == BFLOAT16)
        for (int i = 0; i < count; i++) narrow[i] = from_bfloat16(halves[i]);
    if (dtype == FLOAT16)
        for (int i = 0; i < count; i++) narrow[i] = from_float16(halves[i]);
    if (dtype == FLOAT64 && first)
        for (int i = 0; i < count; i++) total[i] = doubles[i] * coefficient;
    else if (dtype == FLOAT64)
        for (int i = 0; i < count; i++) total[i] += doubles[i] * coefficient;
    else if (first)
        for (int i = 0; i < count; i++) total[i] = singles[i] * coefficient;
    else
        for (int i = 0; i < count; i++) total[i] += singles[i] * coefficient;
}

/* Rounds, and returns whether a result is NaN or infinite. */
INLINE int store(char *out, enum dtype dtype, const double *total, int count) {
    float narrow[CHUNK];
    uint16_t *halves = (uint16_t *)out;
    float *singles = dtype == FLOAT32 ? (float *)out : narrow;
    double *doubles = (double *)out;
    uint64_t bad = 0;
    uint32_t bad_single = 0;
    if (dtype == FLOAT64) {
        for (int i = 0; i < count; i++) {
            doubles[i] = total[i];
            bad |= (double_bits(total[i]) & 0x7FF0000000000000u) == 0x7FF0000000000000u;
        }
        return bad != 0;
    }
    if (dtype == BFLOAT16)
        for (int i = 0; i < count; i++) narrow[i] = (float)rounded(total[i], 8, -126, 127);
    else if (dtype == FLOAT16)
        for (int i = 0; i < count; i++) narrow[i] = (float)rounded(total[i], 11, -14, 15);
    else
        for (int i = 0; i < count; i++) singles[i] = (float)total[i];
    const uint32_t infinity = dtype == FLOAT16 ? 0x47800000 : 0x7F800000;
    for (int i = 0; i < count; i++) bad_single |= (float_bits(singles[i]) & 0x7FFFFFFF) >= infinity;
    if (dtype == BFLOAT16)
        for (int i = 0; i < count; i++) halves[i] = to_bfloat16(narrow[i]);
    if (dtype == FLOAT16)
        for (int i = 0; i < count; i++) halves[i] = to_float16(narrow[i]);
    return bad_single != 0;
}

VECTORISED static int combine_rows(const char *const *rows, Py_ssize_t count, enum dtype source, const double *coefficients,
                                   double divisor, int exact, char *out, enum dtype target, Py_ssize_t length) {
    double total[CHUNK];
    int bad = 0;
    for (Py_ssize_t start = 0; start < length; start += CHUNK) {
        int size = length - start < CHUNK ? (int)(length - start) : CHUNK;
        for (Py_ssize_t j = 0; j < count; j++)
            accumulate(total, rows[j] + start * itemsize[source], source, size, coefficients[j], j == 0);
        if (exact) /* the divisor is a power of two */
            for (int i = 0; i < size; i++) total[i] *= 1 / divisor;
        else
            for (int i = 0; i < size; i++) total[i] /= divisor;
        bad |= store(out + start * itemsize[target], target, total, size);
    }
    return bad;
}

/* Sets the sums of rows, and adds to the sums of columns, of a matrix of 64-bit words, modulo 2**64. */
VECTORISED static void add_sums(const char *bytes, Py_ssize_t size, uint64_t *sums, uint64_t *columns) {
    uint64_t words[ROW_WORDS];
    for (Py_ssize_t row = 0; row * (Py_ssize_t)sizeof words < size; row++) {
        Py_ssize_t start = row * (Py_ssize_t)sizeof words, present = size - start;
        uint64_t sum = 0;
        if (present < (Py_ssize_t)sizeof words) memset(words, 0, sizeof words);
        memcpy(words, bytes + start, present < (Py_ssize_t)sizeof words ? (size_t)present : sizeof words);
        for (int i = 0; i < ROW_WORDS; i++) {
            sum += words[i];
            columns[i] += words[i];
        }
        sums[row] = sum;
    }
}

/* products[i][j] += ⟨d_i, d_j⟩ for i ≤ j, where d_0 = x_0 and d_i = x_i − x_0; `wide` holds count · CHUNK numbers. */
VECTORISED static void multiply_rows(const char *const *rows, Py_ssize_t count, enum dtype source, Py_ssize_t length,
                                     double *wide, double *products) {
    for (Py_ssize_t start = 0; start < length; start += CHUNK) {
        int size = length - start < CHUNK ? (int)(length - start) : CHUNK;
        for (Py_ssize_t j = 0; j < count; j++) {
            double *own = wide + j * CHUNK;
            memset(own, 0, CHUNK * sizeof *own);
            accumulate(own, rows[j] + start * itemsize[source], source, size, 1.0, 1);
            if (j)
                for (int i = 0; i < CHUNK; i++) own[i] -= wide[i];
        }
        for (Py_ssize_t a = 0; a < count; a++)
            for (Py_ssize_t b = a; b < count; b++) {
                const double *left = wide + a * CHUNK, *right = wide + b * CHUNK;
                double lanes[LANES] = {0}, sum = 0;
                for (int i = 0; i < CHUNK; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) lanes[lane] += left[i + lane] * right[i + lane];
                for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
                products[a * count + b] += sum;
            }
    }
}

/* ---- the interface to Python ---- */

typedef struct {
    Py_buffer *views;
    const char **rows;
    Py_ssize_t count, length; /* elements in each row */
} Rows;

static void release_rows(Rows *rows) {
    for (Py_ssize_t i = 0; rows->views && i < rows->count; i++)
        if (rows->rows[i]) PyBuffer_Release(&rows->views[i]);
    PyMem_Free(rows->views);
    PyMem_Free((void *)rows->rows);
}

static int take_rows(PyObject *sequence, int dtype, Rows *rows) {
    memset(rows, 0, sizeof *rows);
    if (dtype < 0 || dtype >= DTYPES) {
        PyErr_Format(PyExc_ValueError, "unknown dtype %d", dtype);
        return -1;
    }
    Py_ssize_t count = PySequence_Size(sequence);
    if (count < 0) return -1;
    if (count == 0 || count > MOST) {
        PyErr_Format(PyExc_ValueError, "%zd rows; from 1 to %d can be combined", count, MOST);
        return -1;
    }
    rows->views = PyMem_Calloc((size_t)count, sizeof *rows->views);
    rows->rows = PyMem_Calloc((size_t)count, sizeof *rows->rows);
    if (!rows->views || !rows->rows) {
        PyErr_NoMemory();
        return -1;
    }
    for (rows->count = 0; rows->count < count; rows->count++) {
        Py_ssize_t i = rows->count;
        PyObject *item = PySequence_GetItem(sequence, i);
        if (!item) return -1;
        int failed = PyObject_GetBuffer(item, &rows->views[i], PyBUF_SIMPLE);
        Py_DECREF(item);
        if (failed) return -1;
        rows->rows[i] = rows->views[i].buf;
        if (rows->views[i].len != rows->views[0].len || rows->views[i].len % itemsize[dtype]) {
            PyErr_Format(PyExc_ValueError, "row %zd has %zd bytes, row 0 %zd", i, rows->views[i].len, rows->views[0].len);
            rows->count++;
            return -1;
        }
    }
    rows->length = rows->views[0].len / itemsize[dtype];
    return 0;
}

PyDoc_STRVAR(combine_doc,
             "combine(rows, source, coefficients, divisor, out, target) -> bool\n\n"
             "Σ cᵢ·xᵢ / divisor of rows of numbers of the dtype source, summed in float64 in their order and rounded\n"
             "once into out, numbers of the dtype target. True if all of these are finite.");

static PyObject *combine(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *sequence, *coefficients, *result = NULL;
    Py_buffer out;
    Rows rows;
    int source, target, bad;
    double divisor, *factors = NULL;
    if (!PyArg_ParseTuple(arguments, "OiOdw*i", &sequence, &source, &coefficients, &divisor, &out, &target)) return NULL;
    if (take_rows(sequence, source, &rows)) goto done;
    if (target < 0 || target >= DTYPES || out.len != rows.length * itemsize[target]) {
        PyErr_Format(PyExc_ValueError, "%zd bytes for %zd results of dtype %d", out.len, rows.length, target);
        goto done;
    }
    factors = PyMem_Calloc((size_t)rows.count, sizeof *factors);
    if (!factors) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < rows.count; i++) {
        factors[i] = 1;
        if (coefficients != Py_None) {
            PyObject *item = PySequence_GetItem(coefficients, i);
            if (!item) goto done;
            factors[i] = PyFloat_AsDouble(item);
            Py_DECREF(item);
            if (PyErr_Occurred()) goto done;
        }
    }
    int exact = (double_bits(divisor) & 0xFFFFFFFFFFFFFu) == 0;
    Py_BEGIN_ALLOW_THREADS;
    bad = combine_rows(rows.rows, rows.count, source, factors, divisor, exact, out.buf, target, rows.length);
    Py_END_ALLOW_THREADS;
    result = PyBool_FromLong(!bad);
done:
    PyMem_Free(factors);
    release_rows(&rows);
    PyBuffer_Release(&out);
    return result;
}

PyDoc_STRVAR(sums_doc,
             "sums(piece, start, out) -> None\n\n"
             "The 256 row sums and 128 column sums, modulo 2**64, of bytes, padded with zeros, as a matrix of 64-bit\n"
             "integers. The bytes may come in pieces of whole rows: piece is what begins at byte start.");

static PyObject *sums(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *result = NULL;
    Py_buffer piece, out;
    Py_ssize_t start, row_bytes = ROW_WORDS * 8;
    if (!PyArg_ParseTuple(arguments, "y*nw*", &piece, &start, &out)) return NULL;
    if (start < 0 || start % row_bytes || start > ROWS * row_bytes || piece.len > ROWS * row_bytes - start ||
        out.len != (ROWS + ROW_WORDS) * 8)
        PyErr_Format(PyExc_ValueError, "a piece of %zd bytes at %zd into %zd", piece.len, start, out.len);
    else {
        uint64_t *totals = out.buf;
        Py_BEGIN_ALLOW_THREADS;
        if (start == 0) memset(totals, 0, (size_t)out.len);
        add_sums(piece.buf, piece.len, totals + start / row_bytes, totals + ROWS);
        Py_END_ALLOW_THREADS;
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&piece);
    PyBuffer_Release(&out);
    return result;
}

PyDoc_STRVAR(products_doc,
             "products(rows, source, total) -> None\n\n"
             "Adds the inner products of d₀ = x₀ and dᵢ = xᵢ − x₀ to total, a square matrix of float64, of which only\n"
             "the upper triangle is touched.");

static PyObject *products(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *sequence, *result = NULL;
    Py_buffer total;
    Rows rows;
    int source;
    double *wide = NULL;
    if (!PyArg_ParseTuple(arguments, "Oiw*", &sequence, &source, &total)) return NULL;
    if (take_rows(sequence, source, &rows)) goto done;
    if (total.len != rows.count * rows.count * (Py_ssize_t)sizeof *wide) {
        PyErr_Format(PyExc_ValueError, "%zd bytes for the products of %zd rows", total.len, rows.count);
        goto done;
    }
    wide = PyMem_Calloc((size_t)rows.count * CHUNK, sizeof *wide);
    if (!wide) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS;
    multiply_rows(rows.rows, rows.count, source, rows.length, wide, total.buf);
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    PyMem_Free(wide);
    release_rows(&rows);
    PyBuffer_Release(&total);
    return result;
}

static PyMethodDef methods[] = {
    {"combine", combine, METH_VARARGS, combine_doc},
    {"products", products, METH_VARARGS, products_doc},
    {"sums", sums, METH_VARARGS, sums_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "averaging._kernels", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
