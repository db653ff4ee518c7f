/* Preloaded into the embedded tritonserver to ignore cancellation: Triton answers a gRPC call that its client cancelled.

   Before 25.04, Triton may crash with SIGSEGV if a call is cancelled while it is answered
   (triton-inference-server/server#8034). Three things cancel a call in gRPC's server. All arrive as HTTP/2 bytes
   (RFC 9113), which this library changes as they are read:

     RST_STREAM             the client cancels: the frame gets the number of a stream that does not exist
     header grpc-timeout    gRPC's server cancels the call after that time: the header is renamed to grpc-timeous
     connection closed      gRPC sees it only after all complete requests are answered

   A call is still cancelled while its request is incomplete, because Triton does not know of it yet. Calls over TLS are
   still cancelled too, because their bytes are encrypted here. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { DATA = 0, HEADERS = 1, RST_STREAM = 3, CONTINUATION = 9 }; /* frame types */
enum { END_STREAM = 1 };                                           /* a flag of DATA and HEADERS */
enum { FRAME_HEADER = 9, PREFACE = 24 };

static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/* The header's name in HPACK, plain and Huffman-coded (RFC 7541, appendix B). Only the last byte changes: in the Huffman
   code, s has as many bits as t. */
static const uint8_t plain_name[] = "grpc-timeout", huffman_name[] = {0x9a, 0xca, 0xc8, 0xb2, 0x4d, 0x49, 0x4f, 0x6a, 0x7f};
enum { PLAIN_LENGTH = sizeof plain_name - 1, HUFFMAN_LENGTH = sizeof huffman_name, PLAIN_S = 's', HUFFMAN_S = 0x3f };

/* The position within the frames of one direction of a connection. */
struct frames {
    uint8_t header[FRAME_HEADER];
    uint32_t header_bytes, payload_left; /* bytes read so far; bytes to come */
};

struct call {
    uint32_t stream;
    bool is_complete; /* the whole request has been read */
};

struct connection {
    pthread_mutex_t lock;
    _Atomic enum { IGNORED, NEW, HTTP2, CLIENT_CLOSED } state; /* CLIENT_CLOSED: gRPC does not know it yet */
    struct frames in, out;
    uint32_t preface_bytes, plain_bytes, huffman_bytes; /* matched so far */
    uint32_t window_bytes_read;                         /* of window_frames, by gRPC */
    struct call *calls;                                 /* not answered yet */
    size_t count, capacity;
};

/* Frames that gRPC reads after the client has closed. They open the flow-control windows to 256 MiB for the connection and
   each call, so that answers that nobody reads are not blocked. */
static const uint8_t window_frames[] = {0, 0, 4, 8, 0, 0, 0, 0, 0, 0x10, 0, 0, 0,          /* WINDOW_UPDATE */
                                        0, 0, 6, 4, 0, 0, 0, 0, 0, 0,    4, 0x10, 0, 0, 0}; /* SETTINGS */

enum { MAX_FDS = 1 << 16, MAX_CALLS = 1 << 12 }; /* each frame searches the calls linearly */
static _Atomic(struct connection *) connections[MAX_FDS]; /* by file descriptor; never freed, reused */

static ssize_t (*real_recvmsg)(int, struct msghdr *, int);
static ssize_t (*real_sendmsg)(int, const struct msghdr *, int);
static int (*real_accept4)(int, struct sockaddr *, socklen_t *, int);
static int (*real_close)(int);

__attribute__((constructor)) static void find_real(void) {
    *(void **)&real_recvmsg = dlsym(RTLD_NEXT, "recvmsg");
    *(void **)&real_sendmsg = dlsym(RTLD_NEXT, "sendmsg");
    *(void **)&real_accept4 = dlsym(RTLD_NEXT, "accept4");
    *(void **)&real_close = dlsym(RTLD_NEXT, "close");
}

static struct connection *connection_of(int fd) {
    return fd >= 0 && fd < MAX_FDS ? atomic_load(&connections[fd]) : NULL;
}

static uint32_t stream_of(const uint8_t *header) {
    return (uint32_t)(header[5] & 0x7f) << 24 | (uint32_t)header[6] << 16 | (uint32_t)header[7] << 8 | header[8];
}

static struct call *find(struct connection *c, uint32_t stream) {
    for (size_t i = 0; i < c->count; i++) {
        if (c->calls[i].stream == stream) {
            return &c->calls[i];
        }
    }
    return NULL;
}

static bool has_complete_call(const struct connection *c) {
    for (size_t i = 0; i < c->count; i++) {
        if (c->calls[i].is_complete) {
            return true;
        }
    }
    return false;
}

/* Records a frame from the client. Changes its stream number if it cancels a call. */
static void record_request_frame(struct connection *c) {
    uint8_t *header = c->in.header;
    uint32_t stream = stream_of(header);
    struct call *call = find(c, stream);
    if (header[3] == HEADERS && call == NULL) {
        if (c->count == MAX_CALLS) {
            return; /* this call can be cancelled */
        }
        if (c->count == c->capacity) {
            size_t capacity = c->capacity ? 2 * c->capacity : 16;
            struct call *calls = realloc(c->calls, capacity * sizeof *calls);
            if (calls == NULL) {
                return; /* likewise */
            }
            c->calls = calls;
            c->capacity = capacity;
        }
        call = &c->calls[c->count++];
        *call = (struct call){stream, false};
    }
    if (call != NULL && (header[3] == HEADERS || header[3] == DATA) && header[4] & END_STREAM) {
        call->is_complete = true;
    }
    if (call != NULL && header[3] == RST_STREAM) {
        if (call->is_complete) {
            header[8] ^= 1;
        } else {
            *call = c->calls[--c->count];
        }
    }
}

/* Records a frame to the client. */
static void record_answer_frame(struct connection *c) {
    const uint8_t *header = c->out.header;
    uint32_t stream = stream_of(header);
    bool ends = header[3] == RST_STREAM || ((header[3] == HEADERS || header[3] == DATA) && header[4] & END_STREAM);
    struct call *call = ends ? find(c, stream) : NULL;
    if (call != NULL) {
        *call = c->calls[--c->count];
    }
}

static uint32_t matched(const uint8_t *name, uint32_t bytes, uint8_t byte) {
    return byte == name[bytes] ? bytes + 1 : byte == name[0];
}

static void rename_timeout(struct connection *c, uint8_t *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        c->plain_bytes = matched(plain_name, c->plain_bytes, bytes[i]);
        c->huffman_bytes = matched(huffman_name, c->huffman_bytes, bytes[i]);
        if (c->plain_bytes == PLAIN_LENGTH) {
            bytes[i] = PLAIN_S;
            c->plain_bytes = 0;
        }
        if (c->huffman_bytes == HUFFMAN_LENGTH) {
            bytes[i] = HUFFMAN_S;
            c->huffman_bytes = 0;
        }
    }
}

/* Tracks the frames of one direction through `count` bytes. */
static void track(struct connection *c, struct frames *frames, uint8_t *bytes, size_t count) {
    bool is_in = frames == &c->in;
    while (count > 0) {
        if (is_in && c->preface_bytes < PREFACE) {
            if (*bytes != (uint8_t)preface[c->preface_bytes]) {
                c->state = IGNORED;
                return;
            }
            c->state = ++c->preface_bytes == PREFACE ? HTTP2 : c->state;
            bytes++;
            count--;
        } else if (frames->payload_left > 0) {
            size_t part = count < frames->payload_left ? count : frames->payload_left;
            if (is_in && (frames->header[3] == HEADERS || frames->header[3] == CONTINUATION)) {
                rename_timeout(c, bytes, part);
            }
            frames->payload_left -= part;
            bytes += part;
            count -= part;
        } else {
            frames->header[frames->header_bytes++] = *bytes;
            if (frames->header_bytes == FRAME_HEADER) {
                if (is_in) {
                    record_request_frame(c);
                    *bytes = frames->header[8];
                } else {
                    record_answer_frame(c);
                }
                frames->header_bytes = 0;
                frames->payload_left = (uint32_t)frames->header[0] << 16 | (uint32_t)frames->header[1] << 8 | frames->header[2];
            }
            bytes++;
            count--;
        }
    }
}

/* Tracks the first `count` bytes of the buffers. */
static void track_all(struct connection *c, struct frames *frames, const struct msghdr *message, size_t count) {
    for (size_t i = 0; count > 0; i++) {
        size_t part = count < message->msg_iov[i].iov_len ? count : message->msg_iov[i].iov_len;
        track(c, frames, message->msg_iov[i].iov_base, part);
        count -= part;
    }
}

/* What gRPC reads after the client has closed: the rest of a DATA frame as zeros, then window_frames, then nothing until all
   complete requests are answered, then the end. */
static ssize_t read_after_close(struct connection *c, struct msghdr *message) {
    ssize_t count = 0;
    for (size_t i = 0; i < (size_t)message->msg_iovlen; i++) {
        uint8_t *bytes = message->msg_iov[i].iov_base;
        for (size_t j = 0; j < message->msg_iov[i].iov_len; j++) {
            if (c->in.payload_left > 0) {
                c->in.payload_left--;
                bytes[j] = 0;
            } else if (c->window_bytes_read < sizeof window_frames) {
                bytes[j] = window_frames[c->window_bytes_read++];
            } else {
                break;
            }
            count++;
        }
    }
    if (count == 0 && has_complete_call(c)) {
        errno = EAGAIN;
        return -1;
    }
    return count;
}

/* Whether 0 bytes read mean the end of the connection. gRPC also reads with no room, after it has filled its buffers. */
static bool has_room(const struct msghdr *message) {
    for (size_t i = 0; i < (size_t)message->msg_iovlen; i++) {
        if (message->msg_iov[i].iov_len > 0) {
            return true;
        }
    }
    return false;
}

static bool is_connection_lost(ssize_t result) {
    return result < 0 && (errno == ECONNRESET || errno == EPIPE || errno == ETIMEDOUT);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    struct connection *c = connection_of(fd);
    ssize_t result = real_recvmsg(fd, message, flags);
    if (c == NULL || flags & (MSG_PEEK | MSG_ERRQUEUE)) {
        return result;
    }
    int error = errno;
    pthread_mutex_lock(&c->lock);
    if (result > 0 && (c->state == NEW || c->state == HTTP2)) {
        track_all(c, &c->in, message, (size_t)result);
    } else if ((result == 0 && has_room(message)) || is_connection_lost(result)) {
        bool is_between = c->in.header_bytes == 0 && (c->in.payload_left == 0 || c->in.header[3] == DATA);
        if (c->state == HTTP2 && is_between && has_complete_call(c)) {
            c->state = CLIENT_CLOSED;
        }
        if (c->state == CLIENT_CLOSED) {
            message->msg_controllen = 0;
            message->msg_flags = 0;
            result = read_after_close(c, message);
            error = errno;
        }
    }
    pthread_mutex_unlock(&c->lock);
    errno = error;
    return result;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    struct connection *c = connection_of(fd);
    ssize_t result = real_sendmsg(fd, message, flags);
    if (c == NULL) {
        return result;
    }
    int error = errno;
    pthread_mutex_lock(&c->lock);
    if ((c->state == HTTP2 || c->state == CLIENT_CLOSED) && (result >= 0 || is_connection_lost(result))) {
        if (result < 0) { /* pretend that it was sent */
            result = 0;
            for (size_t i = 0; i < (size_t)message->msg_iovlen; i++) {
                result += (ssize_t)message->msg_iov[i].iov_len;
            }
        }
        track_all(c, &c->out, message, (size_t)result);
        if (c->state == CLIENT_CLOSED && !has_complete_call(c)) {
            shutdown(fd, SHUT_RDWR); /* wakes gRPC, which then reads the end */
        }
    }
    pthread_mutex_unlock(&c->lock);
    errno = error;
    return result;
}

int accept4(int listener, struct sockaddr *address, socklen_t *length, int flags) {
    int fd = real_accept4(listener, address, length, flags);
    if (fd < 0 || fd >= MAX_FDS) {
        return fd;
    }
    struct connection *c = connection_of(fd);
    if (c == NULL && (c = calloc(1, sizeof *c)) != NULL) {
        pthread_mutex_init(&c->lock, NULL);
        atomic_store(&connections[fd], c);
    }
    if (c != NULL) {
        pthread_mutex_lock(&c->lock);
        struct call *calls = c->calls;
        size_t capacity = c->capacity;
        memset(&c->in, 0, sizeof *c - offsetof(struct connection, in));
        c->calls = calls;
        c->capacity = capacity;
        c->state = NEW;
        pthread_mutex_unlock(&c->lock);
    }
    return fd;
}

int close(int fd) {
    struct connection *c = connection_of(fd);
    if (c != NULL) {
        c->state = IGNORED; /* no lock: this also runs in a forked child */
    }
    return real_close(fd);
}
