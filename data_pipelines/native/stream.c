#include "stream.h"

#include <math.h>

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

static PyMethodDef METHODS[] = {
    {"bits", stream_bits, METH_NOARGS, "The next 64 random bits."},
    {"random", stream_random, METH_NOARGS, "The next number, uniform in [0, 1)."},
    {"uniform", stream_uniform, METH_VARARGS, "uniform(low, high): the next number, uniform in [low, high)."},
    {"integer", stream_integer, METH_O, "integer(count): the next integer of 0 .. count - 1."},
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
