/* The client interface of GenTL 1.5 (EMVA), in our own words: types, codes and functions that the producer exports.
 * tests/service/test_producer.py compares every number here with those of the genicam package. */
#ifndef GENTL_H
#define GENTL_H

#include <stddef.h>
#include <stdint.h>

#define GC_API __attribute__((visibility("default"))) GC_ERROR

typedef int32_t GC_ERROR;
typedef uint8_t bool8_t;
typedef int32_t INFO_DATATYPE;
typedef void *GENTL_HANDLE; /* of any module: system, interface, device, port, data stream, buffer, event */

enum {
    GC_ERR_SUCCESS = 0,
    GC_ERR_ERROR = -1001,
    GC_ERR_NOT_INITIALIZED = -1002,
    GC_ERR_NOT_IMPLEMENTED = -1003,
    GC_ERR_RESOURCE_IN_USE = -1004,
    GC_ERR_ACCESS_DENIED = -1005,
    GC_ERR_INVALID_HANDLE = -1006,
    GC_ERR_INVALID_ID = -1007,
    GC_ERR_NO_DATA = -1008,
    GC_ERR_INVALID_PARAMETER = -1009,
    GC_ERR_IO = -1010,
    GC_ERR_TIMEOUT = -1011,
    GC_ERR_ABORT = -1012,
    GC_ERR_NOT_AVAILABLE = -1014,
    GC_ERR_INVALID_ADDRESS = -1015,
    GC_ERR_BUFFER_TOO_SMALL = -1016,
    GC_ERR_INVALID_INDEX = -1017,
    GC_ERR_PARSING_CHUNK_DATA = -1018,
    GC_ERR_OUT_OF_MEMORY = -1021,
    GC_ERR_BUSY = -1022,
};

enum {
    INFO_DATATYPE_STRING = 1,
    INFO_DATATYPE_INT32 = 5,
    INFO_DATATYPE_UINT32 = 6,
    INFO_DATATYPE_UINT64 = 8,
    INFO_DATATYPE_PTR = 10,
    INFO_DATATYPE_BOOL8 = 11,
    INFO_DATATYPE_SIZET = 12,
};

enum {
    TL_INFO_ID = 0,
    TL_INFO_VENDOR = 1,
    TL_INFO_MODEL = 2,
    TL_INFO_VERSION = 3,
    TL_INFO_TLTYPE = 4,
    TL_INFO_NAME = 5,
    TL_INFO_PATHNAME = 6,
    TL_INFO_DISPLAYNAME = 7,
    TL_INFO_CHAR_ENCODING = 8,
    TL_INFO_GENTL_VER_MAJOR = 9,
    TL_INFO_GENTL_VER_MINOR = 10,
};
enum { TL_CHAR_ENCODING_UTF8 = 1 };

enum { INTERFACE_INFO_ID = 0, INTERFACE_INFO_DISPLAYNAME = 1, INTERFACE_INFO_TLTYPE = 2 };

enum {
    DEVICE_INFO_ID = 0,
    DEVICE_INFO_VENDOR = 1,
    DEVICE_INFO_MODEL = 2,
    DEVICE_INFO_TLTYPE = 3,
    DEVICE_INFO_DISPLAYNAME = 4,
    DEVICE_INFO_ACCESS_STATUS = 5,
    DEVICE_INFO_USER_DEFINED_NAME = 6,
    DEVICE_INFO_SERIAL_NUMBER = 7,
    DEVICE_INFO_VERSION = 8,
    DEVICE_INFO_TIMESTAMP_FREQUENCY = 9,
};
enum {
    DEVICE_ACCESS_STATUS_UNKNOWN = 0,
    DEVICE_ACCESS_STATUS_READWRITE = 1,
    DEVICE_ACCESS_STATUS_OPEN_READWRITE = 5,
    DEVICE_ACCESS_STATUS_OPEN_READONLY = 6,
};
enum { DEVICE_ACCESS_READONLY = 2, DEVICE_ACCESS_CONTROL = 3, DEVICE_ACCESS_EXCLUSIVE = 4 };

enum {
    PORT_INFO_ID = 0,
    PORT_INFO_VENDOR = 1,
    PORT_INFO_MODEL = 2,
    PORT_INFO_TLTYPE = 3,
    PORT_INFO_MODULE = 4,
    PORT_INFO_LITTLE_ENDIAN = 5,
    PORT_INFO_BIG_ENDIAN = 6,
    PORT_INFO_ACCESS_READ = 7,
    PORT_INFO_ACCESS_WRITE = 8,
    PORT_INFO_ACCESS_NA = 9,
    PORT_INFO_ACCESS_NI = 10,
    PORT_INFO_VERSION = 11,
    PORT_INFO_PORTNAME = 12,
};
enum {
    URL_INFO_URL = 0,
    URL_INFO_SCHEMA_VER_MAJOR = 1,
    URL_INFO_SCHEMA_VER_MINOR = 2,
    URL_INFO_FILE_REGISTER_ADDRESS = 7,
    URL_INFO_FILE_SIZE = 8,
    URL_INFO_SCHEME = 9,
    URL_INFO_FILENAME = 10,
};

enum {
    STREAM_INFO_ID = 0,
    STREAM_INFO_NUM_DELIVERED = 1,
    STREAM_INFO_NUM_UNDERRUN = 2,
    STREAM_INFO_NUM_ANNOUNCED = 3,
    STREAM_INFO_NUM_QUEUED = 4,
    STREAM_INFO_NUM_AWAIT_DELIVERY = 5,
    STREAM_INFO_NUM_STARTED = 6,
    STREAM_INFO_PAYLOAD_SIZE = 7,
    STREAM_INFO_IS_GRABBING = 8,
    STREAM_INFO_DEFINES_PAYLOADSIZE = 9,
    STREAM_INFO_TLTYPE = 10,
    STREAM_INFO_NUM_CHUNKS_MAX = 11,
    STREAM_INFO_BUF_ANNOUNCE_MIN = 12,
    STREAM_INFO_BUF_ALIGNMENT = 13,
};
enum { ACQ_STOP_FLAGS_DEFAULT = 0, ACQ_STOP_FLAGS_KILL = 1 };
enum {
    ACQ_QUEUE_INPUT_TO_OUTPUT = 0,
    ACQ_QUEUE_OUTPUT_DISCARD = 1,
    ACQ_QUEUE_ALL_TO_INPUT = 2,
    ACQ_QUEUE_UNQUEUED_TO_INPUT = 3,
    ACQ_QUEUE_ALL_DISCARD = 4,
};

enum {
    BUFFER_INFO_BASE = 0,
    BUFFER_INFO_SIZE = 1,
    BUFFER_INFO_USER_PTR = 2,
    BUFFER_INFO_TIMESTAMP = 3,
    BUFFER_INFO_NEW_DATA = 4,
    BUFFER_INFO_IS_QUEUED = 5,
    BUFFER_INFO_IS_ACQUIRING = 6,
    BUFFER_INFO_IS_INCOMPLETE = 7,
    BUFFER_INFO_TLTYPE = 8,
    BUFFER_INFO_SIZE_FILLED = 9,
    BUFFER_INFO_WIDTH = 10,
    BUFFER_INFO_HEIGHT = 11,
    BUFFER_INFO_XOFFSET = 12,
    BUFFER_INFO_YOFFSET = 13,
    BUFFER_INFO_XPADDING = 14,
    BUFFER_INFO_YPADDING = 15,
    BUFFER_INFO_FRAMEID = 16,
    BUFFER_INFO_IMAGEPRESENT = 17,
    BUFFER_INFO_IMAGEOFFSET = 18,
    BUFFER_INFO_PAYLOADTYPE = 19,
    BUFFER_INFO_PIXELFORMAT = 20,
    BUFFER_INFO_PIXELFORMAT_NAMESPACE = 21,
    BUFFER_INFO_DELIVERED_IMAGEHEIGHT = 22,
    BUFFER_INFO_DELIVERED_CHUNKPAYLOADSIZE = 23,
    BUFFER_INFO_PIXEL_ENDIANNESS = 26,
    BUFFER_INFO_DATA_SIZE = 27,
    BUFFER_INFO_TIMESTAMP_NS = 28,
    BUFFER_INFO_DATA_LARGER_THAN_BUFFER = 29,
    BUFFER_INFO_CONTAINS_CHUNKDATA = 30,
};
enum { PAYLOAD_TYPE_UNKNOWN = 0, PAYLOAD_TYPE_IMAGE = 1 };
enum { PIXELFORMAT_NAMESPACE_PFNC_32BIT = 4 };
enum { PIXELENDIANNESS_LITTLE = 1 };

enum { EVENT_NEW_BUFFER = 1 };
enum {
    EVENT_EVENT_TYPE = 0,
    EVENT_NUM_IN_QUEUE = 1,
    EVENT_NUM_FIRED = 2,
    EVENT_SIZE_MAX = 3,
    EVENT_INFO_DATA_SIZE_MAX = 4,
};
enum { EVENT_DATA_ID = 0, EVENT_DATA_VALUE = 1 };

#define GENTL_INFINITE 0xffffffffffffffffu /* milliseconds */

#pragma pack(push, 1)
typedef struct {
    GENTL_HANDLE BufferHandle;
    void *pUserPointer;
} EVENT_NEW_BUFFER_DATA;
typedef struct {
    uint64_t Address;
    void *pBuffer;
    size_t Size;
} PORT_REGISTER_STACK_ENTRY;
typedef struct {
    uint64_t ChunkID;
    ptrdiff_t ChunkOffset;
    size_t ChunkLength;
} SINGLE_CHUNK_DATA;
#pragma pack(pop)

GC_API GCInitLib(void);
GC_API GCCloseLib(void);
GC_API GCGetInfo(int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API GCGetLastError(GC_ERROR *code, char *text, size_t *size);
GC_API GCReadPort(GENTL_HANDLE port, uint64_t address, void *out, size_t *size);
GC_API GCWritePort(GENTL_HANDLE port, uint64_t address, const void *in, size_t *size);
GC_API GCReadPortStacked(GENTL_HANDLE port, PORT_REGISTER_STACK_ENTRY *entries, size_t *count);
GC_API GCWritePortStacked(GENTL_HANDLE port, PORT_REGISTER_STACK_ENTRY *entries, size_t *count);
GC_API GCGetPortURL(GENTL_HANDLE port, char *url, size_t *size);
GC_API GCGetNumPortURLs(GENTL_HANDLE port, uint32_t *count);
GC_API GCGetPortURLInfo(GENTL_HANDLE port, uint32_t index, int32_t command, INFO_DATATYPE *type, void *out,
                        size_t *size);
GC_API GCGetPortInfo(GENTL_HANDLE port, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API GCRegisterEvent(GENTL_HANDLE source, int32_t event_type, GENTL_HANDLE *event);
GC_API GCUnregisterEvent(GENTL_HANDLE source, int32_t event_type);

GC_API EventGetData(GENTL_HANDLE event, void *out, size_t *size, uint64_t timeout_ms);
GC_API EventGetDataInfo(GENTL_HANDLE event, const void *data, size_t data_size, int32_t command, INFO_DATATYPE *type,
                        void *out, size_t *size);
GC_API EventGetInfo(GENTL_HANDLE event, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API EventFlush(GENTL_HANDLE event);
GC_API EventKill(GENTL_HANDLE event);

GC_API TLOpen(GENTL_HANDLE *system);
GC_API TLClose(GENTL_HANDLE system);
GC_API TLGetInfo(GENTL_HANDLE system, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API TLUpdateInterfaceList(GENTL_HANDLE system, bool8_t *changed, uint64_t timeout_ms);
GC_API TLGetNumInterfaces(GENTL_HANDLE system, uint32_t *count);
GC_API TLGetInterfaceID(GENTL_HANDLE system, uint32_t index, char *id, size_t *size);
GC_API TLGetInterfaceInfo(GENTL_HANDLE system, const char *id, int32_t command, INFO_DATATYPE *type, void *out,
                          size_t *size);
GC_API TLOpenInterface(GENTL_HANDLE system, const char *id, GENTL_HANDLE *interface);

GC_API IFClose(GENTL_HANDLE interface);
GC_API IFGetInfo(GENTL_HANDLE interface, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API IFGetParentTL(GENTL_HANDLE interface, GENTL_HANDLE *system);
GC_API IFUpdateDeviceList(GENTL_HANDLE interface, bool8_t *changed, uint64_t timeout_ms);
GC_API IFGetNumDevices(GENTL_HANDLE interface, uint32_t *count);
GC_API IFGetDeviceID(GENTL_HANDLE interface, uint32_t index, char *id, size_t *size);
GC_API IFGetDeviceInfo(GENTL_HANDLE interface, const char *id, int32_t command, INFO_DATATYPE *type, void *out,
                       size_t *size);
GC_API IFOpenDevice(GENTL_HANDLE interface, const char *id, int32_t access, GENTL_HANDLE *device);

GC_API DevClose(GENTL_HANDLE device);
GC_API DevGetInfo(GENTL_HANDLE device, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API DevGetParentIF(GENTL_HANDLE device, GENTL_HANDLE *interface);
GC_API DevGetPort(GENTL_HANDLE device, GENTL_HANDLE *port);
GC_API DevGetNumDataStreams(GENTL_HANDLE device, uint32_t *count);
GC_API DevGetDataStreamID(GENTL_HANDLE device, uint32_t index, char *id, size_t *size);
GC_API DevOpenDataStream(GENTL_HANDLE device, const char *id, GENTL_HANDLE *stream);

GC_API DSClose(GENTL_HANDLE stream);
GC_API DSGetInfo(GENTL_HANDLE stream, int32_t command, INFO_DATATYPE *type, void *out, size_t *size);
GC_API DSGetParentDev(GENTL_HANDLE stream, GENTL_HANDLE *device);
GC_API DSAnnounceBuffer(GENTL_HANDLE stream, void *memory, size_t size, void *user, GENTL_HANDLE *buffer);
GC_API DSAllocAndAnnounceBuffer(GENTL_HANDLE stream, size_t size, void *user, GENTL_HANDLE *buffer);
GC_API DSRevokeBuffer(GENTL_HANDLE stream, GENTL_HANDLE buffer, void **memory, void **user);
GC_API DSQueueBuffer(GENTL_HANDLE stream, GENTL_HANDLE buffer);
GC_API DSFlushQueue(GENTL_HANDLE stream, int32_t operation);
GC_API DSStartAcquisition(GENTL_HANDLE stream, int32_t flags, uint64_t frames);
GC_API DSStopAcquisition(GENTL_HANDLE stream, int32_t flags);
GC_API DSGetBufferID(GENTL_HANDLE stream, uint32_t index, GENTL_HANDLE *buffer);
GC_API DSGetBufferInfo(GENTL_HANDLE stream, GENTL_HANDLE buffer, int32_t command, INFO_DATATYPE *type, void *out,
                       size_t *size);
GC_API DSGetBufferChunkData(GENTL_HANDLE stream, GENTL_HANDLE buffer, SINGLE_CHUNK_DATA *chunks, size_t *count);
GC_API DSGetNumBufferParts(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t *count);
GC_API DSGetBufferPartInfo(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t part, int32_t command,
                           INFO_DATATYPE *type, void *out, size_t *size);

/* Of GenTL 1.6 and 1.7; a client that finds them missing complains */
GC_API DSAnnounceCompositeBuffer(GENTL_HANDLE stream, size_t segments, void **memory, size_t *sizes, void *user,
                                 GENTL_HANDLE *buffer);
GC_API DSGetBufferInfoStacked(GENTL_HANDLE stream, GENTL_HANDLE buffer, void *entries, size_t count);
GC_API DSGetBufferPartInfoStacked(GENTL_HANDLE stream, GENTL_HANDLE buffer, void *entries, size_t count);
GC_API DSGetNumFlows(GENTL_HANDLE stream, uint32_t *count);
GC_API DSGetFlowInfo(GENTL_HANDLE stream, uint32_t index, int32_t command, INFO_DATATYPE *type, void *out,
                     size_t *size);
GC_API DSGetNumBufferSegments(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t *count);
GC_API DSGetBufferSegmentInfo(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t index, int32_t command,
                              INFO_DATATYPE *type, void *out, size_t *size);

#endif
