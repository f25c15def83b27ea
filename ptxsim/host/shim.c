// Stands between the host code that CuTe DSL compiles and its runtime library, and hands every launch to a callback.
//
// The host code calls thin wrappers (_cudaLaunchKernelEx and so on) that libcute_dsl_runtime.so exports. A library loaded
// before it wins, so this file exports the same names. Nothing here needs a driver or a GPU. A wrapper that is not
// implemented here returns cudaErrorNotSupported and leaves its name for the caller: build.py lists those it finds in the
// runtime library as PTXSIM_STUBS(X).

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    OUT_OF_MEMORY = 2,
    NOT_SUPPORTED = 801,
    NUM_ATTRIBUTES = 32,
    // cudaDevAttrMaxSharedMemoryPerBlockOptin.
    DEVICE_SHARED_OPTIN = 97,
    // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: the host code subtracts it; static shared memory is checked at the launch.
    FUNCTION_STATIC_SHARED = 1,
};

// What a cudaKernel_t points to. The layout is mirrored in capture.py.
typedef struct {
    const char *name;
    const void *image;
    uint32_t attributes_set;  // bit i: attributes[i] was set
    int32_t attributes[NUM_ATTRIBUTES];
} ptxsim_kernel;

typedef void (*ptxsim_launch_callback)(const ptxsim_kernel *kernel, const void *config, void **args);

static ptxsim_launch_callback launch_callback;
static char first_error[160];

void ptxsim_set_callback(ptxsim_launch_callback callback) { launch_callback = callback; }

// The first call that was refused since the last time, or an empty string.
void ptxsim_take_error(char *text, size_t size) {
    snprintf(text, size, "%s", first_error);
    first_error[0] = 0;
}

static int unsupported(const char *what, long value) {
    if (!first_error[0]) {
        if (value < 0) {
            snprintf(first_error, sizeof first_error, "%s", what);
        } else {
            snprintf(first_error, sizeof first_error, "%s (%ld)", what, value);
        }
    }
    return NOT_SUPPORTED;
}

int _cudaLibraryLoadData(void **library, const void *image) {
    *library = (void *)image;  // the image is in the host code's constant data, so it outlives every use
    return SUCCESS;
}

int _cudaLibraryUnload(void *library) {
    (void)library;
    return SUCCESS;
}

int _cudaLibraryGetKernel(ptxsim_kernel **kernel, const void *library, const char *name) {
    ptxsim_kernel *made = calloc(1, sizeof *made);
    char *copy = made ? malloc(strlen(name) + 1) : NULL;
    if (!copy) {
        free(made);
        return OUT_OF_MEMORY;
    }
    made->name = strcpy(copy, name);
    made->image = library;
    *kernel = made;  // never freed: the host code keeps handles in its own static data
    return SUCCESS;
}

static int set_attribute(ptxsim_kernel *kernel, int attribute, int value) {
    if (attribute < 0 || attribute >= NUM_ATTRIBUTES) {
        return unsupported("kernel attribute", attribute);
    }
    kernel->attributes_set |= 1u << attribute;
    kernel->attributes[attribute] = value;
    return SUCCESS;
}

int _cudaKernelSetAttributeForDevice(ptxsim_kernel *kernel, int attribute, int value, int device) {
    (void)device;
    return set_attribute(kernel, attribute, value);
}

int _cudaFuncSetAttribute(ptxsim_kernel *kernel, int attribute, int value) {
    return set_attribute(kernel, attribute, value);
}

int _cuKernelGetAttribute(int *value, int attribute, ptxsim_kernel *kernel, int device) {
    (void)kernel, (void)device;
    if (attribute != FUNCTION_STATIC_SHARED) {
        return unsupported("_cuKernelGetAttribute of attribute", attribute);
    }
    *value = 0;
    return SUCCESS;
}

int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    if (attribute != DEVICE_SHARED_OPTIN) {
        return unsupported("_cudaDeviceGetAttribute of attribute", attribute);
    }
    *value = 232448;  // 227 KiB, on sm_90 and sm_100 alike
    return SUCCESS;
}

int _cudaGetDevice(int *device) {
    *device = 0;
    return SUCCESS;
}

int _cudaGetDeviceCount(int *count) {
    *count = 1;
    return SUCCESS;
}

int _cudaSetDevice(int device) { return device == 0 ? SUCCESS : unsupported("_cudaSetDevice of device", device); }

int _cudaLaunchKernelEx(const void *config, ptxsim_kernel *kernel, void **args) {
    if (!launch_callback) {
        return unsupported("_cudaLaunchKernelEx outside of ptxsim.host.capture.capture()", -1);
    }
    launch_callback(kernel, config, args);
    return SUCCESS;
}

// The runtime's own version asks the CUDA runtime inside it for the devices; here there is one. capture() holds a lock, so
// there is one caller at a time.
int cuda_dialect_init_library_once(void **slot, int (*init)(void **), int (*load)(void **, int), void *on_error) {
    void *library = NULL;
    int error;
    (void)on_error;
    if (*slot) {
        return SUCCESS;
    }
    error = init(&library);
    if (!error && load) {
        error = load(&library, 0);
    }
    if (!error) {
        *slot = library;
    }
    return error;
}

void cuda_dialect_unload_library_once(void **slot) { *slot = NULL; }

#define PTXSIM_STUB(name) \
    int name(void) { return unsupported(#name, -1); }
#ifdef PTXSIM_STUBS
PTXSIM_STUBS(PTXSIM_STUB)
#endif
