/* What the load tests ask of NVIDIA's libnvidia-ml.so.1, for two GPUs that are not there: the first tells everything,
 * of the second the use is not to be had (as of a part of a divided GPU). Signatures as in nvml.h. */
typedef struct { unsigned int gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;

static int numbers[2] = {0, 1};
enum { SUCCESS = 0, NOT_SUPPORTED = 3 };

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code ? "Not Supported" : "Success"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device)
{
    *device = &numbers[index];
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned int length)
{
    const char *said = *(int *)device ? "NVIDIA Half" : "NVIDIA Whole";
    unsigned int at = 0;
    for (; said[at] && at + 1 < length; at++)
        name[at] = said[at];
    name[at] = 0;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, utilization *found)
{
    found->gpu = 87;
    found->memory = 40;
    return *(int *)device ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory *found)
{
    found->total = 150ULL << 30;
    found->used = (120ULL + *(int *)device) << 30;
    found->free = found->total - found->used;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts)
{
    *milliwatts = 612500 + *(int *)device;
    return SUCCESS;
}
