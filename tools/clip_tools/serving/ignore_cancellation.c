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
enum { HEAD = 9, PREFACE = 24 };

static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/* The header's name in HPACK, plain and Huffman-coded (RFC 7541, appendix B). Only the last byte changes: in the Huffman
   code, s has as many bits as t. */
static const uint8_t plain[] = "grpc-timeout", coded[] = {0x9a, 0xca, 0xc8, 0xb2, 0x4d, 0x49, 0x4f, 0x6a, 0x7f};
enum { PLAIN = sizeof plain - 1, CODED = sizeof coded, PLAIN_S = 's', CODED_S = 0x3f };

/* The position within the frames of one direction of a connection. */
struct frames {
    uint8_t head[HEAD];
    uint32_t head_bytes, left; /* head bytes read so far; payload bytes to come */
};

struct call {
    uint32_t stream;
    bool is_whole; /* the whole request has been read */
};

struct connection {
    pthread_mutex_t lock;
    _Atomic enum { OTHER, NEW, HTTP2, GONE } state; /* GONE: the client has closed, and gRPC does not know yet */
    struct frames in, out;
    uint32_t preface_bytes, plain_bytes, coded_bytes; /* matched so far */
    uint32_t told;                                    /* bytes of last_words that gRPC has read */
    struct call *calls;                               /* not answered yet */
    size_t count, room;
};

/* Frames that gRPC reads after the client has closed. They open the flow-control windows to 256 MiB for the connection and
   each call, so that answers that nobody reads are not blocked. */
static const uint8_t last_words[] = {0, 0, 4, 8, 0, 0, 0, 0, 0, 0x10, 0, 0, 0,          /* WINDOW_UPDATE */
                                     0, 0, 6, 4, 0, 0, 0, 0, 0, 0,    4, 0x10, 0, 0, 0}; /* SETTINGS */

enum { MOST = 1 << 16, MOST_CALLS = 1 << 12 }; /* a linear search for each frame */
static _Atomic(struct connection *) connections[MOST]; /* by file descriptor; never freed, reused */

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

static struct connection *of(int fd) {
    return fd >= 0 && fd < MOST ? atomic_load(&connections[fd]) : NULL;
}

static uint32_t stream_of(const uint8_t *head) {
    return (uint32_t)(head[5] & 0x7f) << 24 | (uint32_t)head[6] << 16 | (uint32_t)head[7] << 8 | head[8];
}

static struct call *find(struct connection *c, uint32_t stream) {
    for (size_t i = 0; i < c->count; i++) {
        if (c->calls[i].stream == stream) {
            return &c->calls[i];
        }
    }
    return NULL;
}

static bool has_whole(const struct connection *c) {
    for (size_t i = 0; i < c->count; i++) {
        if (c->calls[i].is_whole) {
            return true;
        }
    }
    return false;
}

/* Records a frame from the client. Changes its stream number if it cancels a call. */
static void take_in(struct connection *c) {
    uint8_t *head = c->in.head;
    uint32_t stream = stream_of(head);
    struct call *call = find(c, stream);
    if (head[3] == HEADERS && call == NULL) {
        if (c->count == MOST_CALLS) {
            return; /* this call can be cancelled */
        }
        if (c->count == c->room) {
            size_t room = c->room ? 2 * c->room : 16;
            struct call *calls = realloc(c->calls, room * sizeof *calls);
            if (calls == NULL) {
                return; /* likewise */
            }
            c->calls = calls;
            c->room = room;
        }
        call = &c->calls[c->count++];
        *call = (struct call){stream, false};
    }
    if (call != NULL && (head[3] == HEADERS || head[3] == DATA) && head[4] & END_STREAM) {
        call->is_whole = true;
    }
    if (call != NULL && head[3] == RST_STREAM) {
        if (call->is_whole) {
            head[8] ^= 1;
        } else {
            *call = c->calls[--c->count];
        }
    }
}

/* Records a frame to the client. */
static void take_out(struct connection *c) {
    const uint8_t *head = c->out.head;
    uint32_t stream = stream_of(head);
    bool ends = head[3] == RST_STREAM || ((head[3] == HEADERS || head[3] == DATA) && head[4] & END_STREAM);
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
        c->plain_bytes = matched(plain, c->plain_bytes, bytes[i]);
        c->coded_bytes = matched(coded, c->coded_bytes, bytes[i]);
        if (c->plain_bytes == PLAIN) {
            bytes[i] = PLAIN_S;
            c->plain_bytes = 0;
        }
        if (c->coded_bytes == CODED) {
            bytes[i] = CODED_S;
            c->coded_bytes = 0;
        }
    }
}

/* Tracks the frames of one direction through `count` bytes. */
static void follow(struct connection *c, struct frames *frames, uint8_t *bytes, size_t count) {
    bool is_in = frames == &c->in;
    while (count > 0) {
        if (is_in && c->preface_bytes < PREFACE) {
            if (*bytes != (uint8_t)preface[c->preface_bytes]) {
                c->state = OTHER;
                return;
            }
            c->state = ++c->preface_bytes == PREFACE ? HTTP2 : c->state;
            bytes++;
            count--;
        } else if (frames->left > 0) {
            size_t part = count < frames->left ? count : frames->left;
            if (is_in && (frames->head[3] == HEADERS || frames->head[3] == CONTINUATION)) {
                rename_timeout(c, bytes, part);
            }
            frames->left -= part;
            bytes += part;
            count -= part;
        } else {
            frames->head[frames->head_bytes++] = *bytes;
            if (frames->head_bytes == HEAD) {
                if (is_in) {
                    take_in(c);
                    *bytes = frames->head[8];
                } else {
                    take_out(c);
                }
                frames->head_bytes = 0;
                frames->left = (uint32_t)frames->head[0] << 16 | (uint32_t)frames->head[1] << 8 | frames->head[2];
            }
            bytes++;
            count--;
        }
    }
}

/* Tracks the first `count` bytes of the buffers. */
static void follow_all(struct connection *c, struct frames *frames, const struct msghdr *message, size_t count) {
    for (size_t i = 0; count > 0; i++) {
        size_t part = count < message->msg_iov[i].iov_len ? count : message->msg_iov[i].iov_len;
        follow(c, frames, message->msg_iov[i].iov_base, part);
        count -= part;
    }
}

/* What gRPC reads after the client has closed: the rest of a DATA frame as zeros, then last_words, then nothing until all
   complete requests are answered, then the end. */
static ssize_t read_of_gone(struct connection *c, struct msghdr *message) {
    ssize_t count = 0;
    for (size_t i = 0; i < (size_t)message->msg_iovlen; i++) {
        uint8_t *bytes = message->msg_iov[i].iov_base;
        for (size_t j = 0; j < message->msg_iov[i].iov_len; j++) {
            if (c->in.left > 0) {
                c->in.left--;
                bytes[j] = 0;
            } else if (c->told < sizeof last_words) {
                bytes[j] = last_words[c->told++];
            } else {
                break;
            }
            count++;
        }
    }
    if (count == 0 && has_whole(c)) {
        errno = EAGAIN;
        return -1;
    }
    return count;
}

static bool is_lost(ssize_t result) {
    return result < 0 && (errno == ECONNRESET || errno == EPIPE || errno == ETIMEDOUT);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    struct connection *c = of(fd);
    ssize_t result = real_recvmsg(fd, message, flags);
    if (c == NULL || flags & (MSG_PEEK | MSG_ERRQUEUE)) {
        return result;
    }
    int error = errno;
    pthread_mutex_lock(&c->lock);
    if (result > 0 && (c->state == NEW || c->state == HTTP2)) {
        follow_all(c, &c->in, message, (size_t)result);
    } else if (result == 0 || is_lost(result)) {
        bool is_between = c->in.head_bytes == 0 && (c->in.left == 0 || c->in.head[3] == DATA);
        if (c->state == HTTP2 && is_between && has_whole(c)) {
            c->state = GONE;
        }
        if (c->state == GONE) {
            message->msg_controllen = 0;
            message->msg_flags = 0;
            result = read_of_gone(c, message);
            error = errno;
        }
    }
    pthread_mutex_unlock(&c->lock);
    errno = error;
    return result;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    struct connection *c = of(fd);
    ssize_t result = real_sendmsg(fd, message, flags);
    if (c == NULL) {
        return result;
    }
    int error = errno;
    pthread_mutex_lock(&c->lock);
    if ((c->state == HTTP2 || c->state == GONE) && (result >= 0 || is_lost(result))) {
        if (result < 0) { /* pretend that it was sent */
            result = 0;
            for (size_t i = 0; i < (size_t)message->msg_iovlen; i++) {
                result += (ssize_t)message->msg_iov[i].iov_len;
            }
        }
        follow_all(c, &c->out, message, (size_t)result);
        if (c->state == GONE && !has_whole(c)) {
            shutdown(fd, SHUT_RDWR); /* wakes gRPC, which then reads the end */
        }
    }
    pthread_mutex_unlock(&c->lock);
    errno = error;
    return result;
}

int accept4(int listener, struct sockaddr *address, socklen_t *length, int flags) {
    int fd = real_accept4(listener, address, length, flags);
    if (fd < 0 || fd >= MOST) {
        return fd;
    }
    struct connection *c = of(fd);
    if (c == NULL && (c = calloc(1, sizeof *c)) != NULL) {
        pthread_mutex_init(&c->lock, NULL);
        atomic_store(&connections[fd], c);
    }
    if (c != NULL) {
        pthread_mutex_lock(&c->lock);
        struct call *calls = c->calls;
        size_t room = c->room;
        memset(&c->in, 0, sizeof *c - offsetof(struct connection, in));
        c->calls = calls;
        c->room = room;
        c->state = NEW;
        pthread_mutex_unlock(&c->lock);
    }
    return fd;
}

int close(int fd) {
    struct connection *c = of(fd);
    if (c != NULL) {
        c->state = OTHER; /* no lock: this also runs in a forked child */
    }
    return real_close(fd);
}
