/* The kernel as the Python module data_pipelines.native._crops: arguments are checked here, with the interpreter's lock
 * held; the work is done without it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernel.h"
#include "stream.h"

/* A buffer of bytes with three axes. */
static bool get_bytes(PyObject *object, Py_buffer *view, int flags, const char *what) {
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT) != 0)
        return false;
    if (view->ndim == 3 && view->itemsize == 1 && (view->format == NULL || strcmp(view->format, "B") == 0))
        return true;
    PyErr_Format(PyExc_ValueError, "%s must be an array of uint8 with three axes", what);
    PyBuffer_Release(view);
    return false;
}

static bool parse_jitter(PyObject *operations, Job *job) {
    if (!PyTuple_Check(operations) || PyTuple_GET_SIZE(operations) > MAX_JITTER) {
        PyErr_Format(PyExc_ValueError, "jitter must be a tuple of at most %d operations", MAX_JITTER);
        return false;
    }
    job->num_jitter = (int)PyTuple_GET_SIZE(operations);
    for (int i = 0; i < job->num_jitter; i++) {
        PyObject *item = PyTuple_GET_ITEM(operations, i);
        int operation;
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_ValueError, "an operation of jitter must be a tuple (number, factor)");
            return false;
        }
        if (!PyArg_ParseTuple(item, "id", &operation, &job->jitter[i].factor))
            return false;
        job->jitter[i].operation = (Operation)operation;
    }
    return true;
}

/* Fills in `job` and holds its output in `view`, to be released if this succeeds. */
static bool parse_job(PyObject *item, const Image *image, Job *job, Py_buffer *view) {
    PyObject *out, *jitter;
    int filter, flip, grey, solarise;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_ValueError, "a job must be a tuple");
        return false;
    }
    if (!PyArg_ParseTuple(item, "O(dddd)ipOpdp", &out, &job->left, &job->top, &job->right, &job->bottom, &filter, &flip,
                          &jitter, &grey, &job->blur_radius, &solarise) ||
        !parse_jitter(jitter, job) || !get_bytes(out, view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS, "the output"))
        return false;
    job->filter = (Filter)filter;
    job->flip = flip;
    job->grey = grey;
    job->solarise = solarise;
    job->out = view->buf;
    job->height = view->shape[1];
    job->width = view->shape[2];
    const char *wrong = check_job(image, job);
    if (wrong == NULL && view->shape[0] != image->channels)
        wrong = "the output has not as many channels as the image";
    if (wrong == NULL)
        return true;
    PyErr_Format(PyExc_ValueError, "a crop of %zd x %zd px from an image of %zd x %zd px (height x width): %s", job->height,
                 job->width, image->height, image->width, wrong);
    PyBuffer_Release(view);
    return false;
}

static Image image_of(const Py_buffer *source) {
    return (Image){.pixels = source->buf,
                   .height = source->shape[0],
                   .width = source->shape[1],
                   .channels = source->shape[2],
                   .row_stride = source->strides[0],
                   .pixel_stride = source->strides[1],
                   .channel_stride = source->strides[2]};
}

static PyObject *render(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *array, *items, *result = NULL;
    int portable = 0;
    if (!PyArg_ParseTuple(args, "OO!|p:render", &array, &PyList_Type, &items, &portable))
        return NULL;
    Py_buffer source;
    if (!get_bytes(array, &source, PyBUF_STRIDES, "the image"))
        return NULL;
    const Image image = image_of(&source);
    const Py_ssize_t count = PyList_GET_SIZE(items);
    Py_ssize_t parsed = 0;
    Job *jobs = PyMem_Calloc((size_t)count + 1, sizeof(Job));
    Py_buffer *views = PyMem_Calloc((size_t)count + 1, sizeof(Py_buffer));
    if (jobs == NULL || views == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    /* Parsing runs code of others (buffers, numbers), which may change the list: its length is asked for each time. */
    while (parsed < count) {
        if (parsed >= PyList_GET_SIZE(items)) {
            PyErr_SetString(PyExc_RuntimeError, "the list of jobs changed while it was read");
            goto done;
        }
        PyObject *item = PyList_GET_ITEM(items, parsed);
        Py_INCREF(item);
        const bool good = parse_job(item, &image, &jobs[parsed], &views[parsed]);
        Py_DECREF(item);
        if (!good)
            goto done;
        parsed++;
    }
    bool enough_memory = true;
    Py_BEGIN_ALLOW_THREADS
    const bool wide = !portable && has_avx2();
    Scratch scratch = {0};
    for (Py_ssize_t i = 0; i < count && enough_memory; i++)
        enough_memory = make_crop(&image, &jobs[i], &scratch, wide);
    free_scratch(&scratch);
    Py_END_ALLOW_THREADS
    if (enough_memory)
        result = Py_NewRef(Py_None);
    else
        PyErr_NoMemory();
done:
    while (parsed > 0)
        PyBuffer_Release(&views[--parsed]);
    PyMem_Free(views);
    PyMem_Free(jobs);
    PyBuffer_Release(&source);
    return result;
}

/* An array with three axes, of bytes, words, or floats where `floats` says so. */
static bool get_numbers(PyObject *object, Py_buffer *view, int flags, bool floats, Kind *kind, const char *what) {
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT) != 0)
        return false;
    const char *format = view->format == NULL ? "B" : view->format;
    const bool known = strcmp(format, "B") == 0 || strcmp(format, "H") == 0 || (floats && strcmp(format, "f") == 0);
    if (view->ndim == 3 && known) {
        *kind = *format == 'B' ? BYTES : *format == 'H' ? WORDS : FLOATS;
        return true;
    }
    PyErr_Format(PyExc_ValueError, "%s must be an array of uint8%s uint16%s with three axes", what, floats ? "," : " or",
                 floats ? " or float32" : "");
    PyBuffer_Release(view);
    return false;
}

static PyObject *resize(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *array, *out;
    Job job = {0};
    int filter, flip, portable = 0;
    if (!PyArg_ParseTuple(args, "OO(dddd)ip|p:resize", &array, &out, &job.left, &job.top, &job.right, &job.bottom,
                          &filter, &flip, &portable))
        return NULL;
    Py_buffer source, target;
    Kind kind, out_kind;
    if (!get_numbers(array, &source, PyBUF_STRIDES, false, &kind, "the image"))
        return NULL;
    if (!get_numbers(out, &target, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS, true, &out_kind, "the output")) {
        PyBuffer_Release(&source);
        return NULL;
    }
    const Image image = image_of(&source);
    job.filter = (Filter)filter;
    job.flip = flip;
    job.out = target.buf;
    job.height = target.shape[1];
    job.width = target.shape[2];
    const char *wrong = check_job(&image, &job);
    if (wrong == NULL && target.shape[0] != image.channels)
        wrong = "the output has not as many channels as the image";
    if (wrong == NULL && image.channels > 1 && source.strides[2] != source.itemsize)
        wrong = "the channels of a pixel do not lie one behind the other";
    if (wrong == NULL && kind == WORDS &&
        ((uintptr_t)source.buf % 2 != 0 || source.strides[0] % 2 != 0 || source.strides[1] % 2 != 0))
        wrong = "its numbers of 16 bits lie at odd addresses";
    if (wrong == NULL && out_kind != FLOATS && out_kind != kind)
        wrong = "the output is of another type than the image";
    bool enough_memory = true;
    if (wrong == NULL) {
        Py_BEGIN_ALLOW_THREADS
        Scratch scratch = {0};
        enough_memory = resample_channels(&image, kind, &job, out_kind, &scratch, !portable && has_avx2());
        free_scratch(&scratch);
        Py_END_ALLOW_THREADS
        if (!enough_memory)
            PyErr_NoMemory();
    } else {
        PyErr_Format(PyExc_ValueError, "a crop of %zd x %zd px from an image of %zd x %zd px (height x width): %s",
                     job.height, job.width, image.height, image.width, wrong);
    }
    PyBuffer_Release(&target);
    PyBuffer_Release(&source);
    return wrong == NULL && enough_memory ? Py_NewRef(Py_None) : NULL;
}

static PyObject *undo_filters(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *array;
    Py_buffer raw, out;
    if (!PyArg_ParseTuple(args, "y*O:unfilter", &raw, &array))
        return NULL;
    if (!get_bytes(array, &out, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS, "the output")) {
        PyBuffer_Release(&raw);
        return NULL;
    }
    const Py_ssize_t height = out.shape[0], row_bytes = out.shape[1] * out.shape[2];
    const bool fits = height > 0 && row_bytes > 0 && raw.len == out.len + height;
    bool known = false;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        known = unfilter(raw.buf, height, row_bytes, out.shape[2], out.buf);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "there must be a byte before each row of the output, and no more");
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&raw);
    return fits ? PyBool_FromLong(known) : NULL;
}

static PyObject *instruction_set(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(has_avx2() ? "AVX2" : "portable");
}

static PyMethodDef METHODS[] = {
    {"render", render, METH_VARARGS,
     "render(image, jobs, portable=False): make crops of an image, (h, w, c) uint8 of any strides.\n\n"
     "Each job is (out, (left, top, right, bottom), interpolation, flip, jitter, grey, blur radius, solarise), out being\n"
     "(c, height, width) uint8, C-contiguous; jitter holds (operation, factor). Runs without the interpreter's lock."},
    {"resize", resize, METH_VARARGS,
     "resize(image, out, (left, top, right, bottom), interpolation, flip, portable=False): the box of an image, (h, w, c)\n"
     "uint8 or uint16 whose channels lie side by side, into `out`, (c, height, width) of the same type or float32."},
    {"unfilter", undo_filters, METH_VARARGS,
     "unfilter(raw, out): undo the filters of a PNG's rows, into (h, w, c) uint8; False: there is no such filter."},
    {"instruction_set", instruction_set, METH_NOARGS, "AVX2 or portable: what render() uses on this processor."},
    {NULL, NULL, 0, NULL},
};

static int fill_module(PyObject *module) {
    PyObject *stream = PyType_FromModuleAndSpec(module, &STREAM_SPEC, NULL);
    const int failed = stream == NULL || PyModule_AddType(module, (PyTypeObject *)stream) != 0;
    Py_XDECREF(stream);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, fill_module}, {0, NULL}};
static PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, .m_name = "_crops", .m_methods = METHODS, .m_slots = SLOTS};

PyMODINIT_FUNC PyInit__crops(void) { return PyModuleDef_Init(&MODULE); }
