#!/usr/bin/env python3
"""Becomes ENVOY, for which socket(AF_INET6) fails with EAFNOSUPPORT: seccomp(2), with a filter of classic BPF."""
import ctypes
import errno
import os
import platform
import struct
import sys

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
AF_INET6 = 10
NR_SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
NUMBER, FIRST_ARGUMENT = 0, 16  # of struct seccomp_data

program = b"".join(
    struct.pack("HBBI", *line)
    for line in [
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 3, NR_SOCKET),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (EQUAL, 0, 1, AF_INET6),
        (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ]
)
code = ctypes.create_string_buffer(program, len(program))


class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


libc = ctypes.CDLL(None, use_errno=True)
whole = Program(len(program) // 8, ctypes.addressof(code))
if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(whole)):
    sys.exit(f"no filter: {os.strerror(ctypes.get_errno())}")
os.execv("ENVOY", ["ENVOY", *sys.argv[1:]])
