/* Lists interfaces as a C program does (getifaddrs), then makes one socket of each kind that a filter may refuse.
   Prints one JSON object: {"interfaces": ["lo", ...] or an errno, "AF_NETLINK/0": errno or 0, ...}. */
#include <errno.h>
#include <ifaddrs.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void attempt(const char *name, int family, int type, int protocol) {
    int made = socket(family, type, protocol);
    printf(", \"%s\": %d", name, made < 0 ? errno : 0);
    if (made >= 0)
        close(made);
}

int main(void) {
    struct ifaddrs *first, *one;
    if (getifaddrs(&first) < 0) {
        printf("{\"interfaces\": %d", errno);
    } else {
        printf("{\"interfaces\": [");
        for (one = first; one != NULL; one = one->ifa_next)
            printf("%s\"%s\"", one == first ? "" : ", ", one->ifa_name);
        printf("]");
        freeifaddrs(first);
    }
    attempt("AF_NETLINK/0", 16, SOCK_RAW | SOCK_CLOEXEC, 0);  /* NETLINK_ROUTE */
    attempt("AF_NETLINK/4", 16, SOCK_RAW | SOCK_CLOEXEC, 4);  /* NETLINK_SOCK_DIAG */
    attempt("AF_NETLINK/15", 16, SOCK_DGRAM, 15);             /* NETLINK_KOBJECT_UEVENT */
    attempt("AF_PACKET", 17, SOCK_RAW, 0);
    attempt("AF_BLUETOOTH", 31, SOCK_RAW, 1);
    attempt("AF_VSOCK", 40, SOCK_STREAM, 0);
    attempt("AF_ALG", 38, SOCK_SEQPACKET, 0);
    attempt("AF_INET", AF_INET, SOCK_STREAM, 0);
    attempt("AF_UNIX", AF_UNIX, SOCK_STREAM, 0);
    printf("}\n");
    return 0;
}
