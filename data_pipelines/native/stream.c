#include "stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint64_t GAMMA = 0x9E3779B97F4A7C15u, MIX1 = 0xBF58476D1CE4E5B9u, MIX2 = 0x94D049BB133111EBu;

typedef struct {
    PyObject_HEAD
    uint64_t state;
} Stream;

static uint64_t mix(uint64_t word) {
    word = (word ^ (word >> 30)) * MIX1;
    word = (word ^ (word >> 27)) * MIX2;
    return word ^ (word >> 31);
}

static uint64_t next_bits(Stream *stream) { return mix(stream->state += GAMMA); }

static double next_random(Stream *stream) { return (double)(next_bits(stream) >> 11) * 0x1p-53; }

static PyObject *stream_new(PyTypeObject *type, PyObject *words, PyObject *keywords) {
    if (keywords != NULL && PyDict_GET_SIZE(keywords) != 0) {
        PyErr_SetString(PyExc_TypeError, "Stream() takes integers and no keywords");
        return NULL;
    }
    uint64_t key = (uint64_t)PyTuple_GET_SIZE(words);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(words); i++) {
        PyObject *word = PyNumber_Index(PyTuple_GET_ITEM(words, i));
        if (word == NULL)
            return NULL;
        const uint64_t low = PyLong_AsUnsignedLongLongMask(word); /* modulo 2^64, as all of this is */
        Py_DECREF(word);
        if (PyErr_Occurred())
            return NULL;
        key = mix(key * MIX1 + low + GAMMA);
    }
    Stream *stream = (Stream *)type->tp_alloc(type, 0);
    if (stream != NULL)
        stream->state = key;
    return (PyObject *)stream;
}

static void stream_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *stream_bits(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(next_bits((Stream *)self));
}

static PyObject *stream_random(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyFloat_FromDouble(next_random((Stream *)self));
}

static PyObject *stream_uniform(PyObject *self, PyObject *args) {
    double low, high;
    if (!PyArg_ParseTuple(args, "dd:uniform", &low, &high))
        return NULL;
    return PyFloat_FromDouble(low + (high - low) * next_random((Stream *)self));
}

static PyObject *stream_integer(PyObject *self, PyObject *count) {
    const double limit = PyFloat_AsDouble(count);
    if (limit == -1.0 && PyErr_Occurred())
        return NULL;
    return PyLong_FromDouble(next_random((Stream *)self) * limit);
}

typedef struct {
    uint64_t word;
    int64_t place;
} Drawn;

static int by_word(const void *a, const void *b) {
    const Drawn *x = a, *y = b;
    if (x->word != y->word)
        return x->word < y->word ? -1 : 1;
    return x->place < y->place ? -1 : x->place > y->place;
}

static PyObject *stream_permute(PyObject *self, PyObject *array) {
    Py_buffer view;
    if (PyObject_GetBuffer(array, &view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0)
        return NULL;
    Drawn *drawn = NULL;
    PyObject *result = NULL;
    if (view.itemsize != 8 || view.format == NULL || strchr("lq", *view.format) == NULL) {
        PyErr_SetString(PyExc_ValueError, "permute() fills an array of int64");
        goto done;
    }
    const Py_ssize_t count = view.len / 8;
    drawn = PyMem_RawMalloc((size_t)count * sizeof(Drawn) + 1);
    if (drawn == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    const uint64_t key = next_bits((Stream *)self);
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; i < count; i++)
        drawn[i] = (Drawn){mix(key + (uint64_t)(i + 1) * GAMMA), i};
    qsort(drawn, (size_t)count, sizeof(Drawn), by_word);
    int64_t *out = view.buf;
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = drawn[i].place;
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyMem_RawFree(drawn);
    PyBuffer_Release(&view);
    return result;
}

static PyObject *stream_box(PyObject *self, PyObject *args) {
    long height, width;
    double low, high, log_low, log_high;
    int tries;
    if (!PyArg_ParseTuple(args, "lldddd" "i:box", &height, &width, &low, &high, &log_low, &log_high, &tries))
        return NULL;
    Stream *stream = (Stream *)self;
    const double area = (double)height * (double)width;
    while (tries-- > 0) {
        const double target = area * (low + (high - low) * next_random(stream));
        const double aspect = exp(log_low + (log_high - log_low) * next_random(stream));
        const double w = rint(sqrt(target * aspect)), h = rint(sqrt(target / aspect));
        if (0 < w && w <= (double)width && 0 < h && h <= (double)height) {
            const long top = (long)(next_random(stream) * ((double)height - h + 1));
            const long left = (long)(next_random(stream) * ((double)width - w + 1));
            return Py_BuildValue("llll", left, top, left + (long)w, top + (long)h);
        }
    }
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {
    {"bits", stream_bits, METH_NOARGS, "The next 64 random bits."},
    {"random", stream_random, METH_NOARGS, "The next number, uniform in [0, 1)."},
    {"uniform", stream_uniform, METH_VARARGS, "uniform(low, high): the next number, uniform in [low, high)."},
    {"integer", stream_integer, METH_O, "integer(count): the next integer of 0 .. count - 1."},
    {"permute", stream_permute, METH_O,
     "permute(out): fill an array of int64 with 0 .. its length - 1 in an order that the next number decides."},
    {"box", stream_box, METH_VARARGS,
     "box(height, width, low, high, log_low, log_high, tries): a box of params.random_resized_box(); None: none fits."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_new, stream_new},
    {Py_tp_dealloc, stream_dealloc},
    {Py_tp_methods, METHODS},
    {Py_tp_doc, "Stream(*words): the random numbers that belong to these integers, one at a time."},
    {0, NULL},
};

PyType_Spec STREAM_SPEC = {
    .name = "data_pipelines.crops.native._crops.Stream",
    .basicsize = sizeof(Stream),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};
