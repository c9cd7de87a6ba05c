// Shadows jittor/src/pyjt/numpy.h (found first through -iquote) and hands on to it.
// Jittor 1.3.11 is written against NumPy 1's C ABI.  NumPy 2 changed what it uses:
//  - PyArray_Descr: elsize moved (a 64-bit flags word now follows type_num), so Jittor reads
//    an item size of 0 and copies nothing - silently;
//  - PyArray_CopyInto moved from API slot 82 (now null: crash) to slot 50;
//  - a PyArray_Descr made up on the stack is no longer good enough for CastScalarToCtype.
// Decided at run time, so the same build serves both.
#pragma once
#define PyArray_Size jt_numpy1_PyArray_Size
#include_next "pyjt/numpy.h"
#undef PyArray_Size

namespace jittor {

struct moss_jt_Descr2 {
    PyObject_HEAD
    PyObject* typeobj;
    char kind, type, byteorder, former_flags;
    int type_num;
    unsigned long long flags;
    Py_ssize_t elsize;
};

inline bool moss_jt_numpy2() {
    static bool v = PyArray_GetNDArrayCFeatureVersion() >= 0x12;   // NPY_2_0_API_VERSION
    return v;
}

inline int64 PyArray_Size(PyArray_Proxy* arr) {
    int64 size = moss_jt_numpy2()
        ? (int64)((moss_jt_Descr2*)arr->descr)->elsize : (int64)arr->descr->elsize;
    for (int i=0; i<arr->nd; i++)
        size *= arr->dimensions[i];
    return size;
}

inline int moss_jt_CopyInto(PyObject* dst, PyObject* src) {
    return ((int (*)(PyObject*, PyObject*))PyArray_API[moss_jt_numpy2() ? 50 : 82])(dst, src);
}

inline void moss_jt_CastScalar(PyObject* scalar, void* out, int type_num) {
    PyObject* d = ((PyObject* (*)(int))PyArray_API[45])(type_num);     // DescrFromType
    ((int (*)(PyObject*, void*, PyObject*))PyArray_API[63])(scalar, out, d);
    Py_DECREF(d);
}

} // jittor

// function-like on purpose: numpy.cc's own definitions and fill() lines stay as they are
#define PyArray_CopyInto(dst, src) ::jittor::moss_jt_CopyInto(dst, src)
#define PyArray_CastScalarToCtype(scalar, out, descr) \
    ::jittor::moss_jt_CastScalar(scalar, out, (descr)->type_num)
