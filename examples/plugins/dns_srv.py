#!/usr/bin/env python3
"""A discovery plug-in for vmesh that reads DNS SRV records (RFC 2782).

    discovery:
      - plugin:
          name: dns
          command: [/usr/lib/vmesh/plugins/dns_srv.py, "orders=_orders._tcp.example.internal"]

It shows the protocol, of which there is little: JSON objects, one per line. To standard output go `view` (all that
there is, whenever it changed), `alive` (nothing changed) and `failed` (the registry could not be read). From standard
input come `hello` and `confirm`, which asks to read again at once and to answer with a view that `confirms` it. When
standard input ends, so does the program. What is printed to standard error goes to the log of vmesh-control.

Nothing here decides what is safe: a registry that forgets half of its instances is passed on as it is, and vmesh holds
what looks like an accident.
"""

import argparse
import json
import random
import select
import socket
import struct
import sys
import time

SRV, A, AAAA = 33, 1, 28
NXDOMAIN = 3


class Failed(Exception):
    """The name servers gave no answer that can be used."""


def question(name):
    """A query for the SRV records of `name`."""
    ident = random.randrange(1 << 16)
    labels = b"".join(bytes([len(part)]) + part.encode("ascii") for part in name.rstrip(".").split("."))
    # Recursion desired; one question, and one OPT record that allows answers of 4 KiB over UDP (RFC 6891).
    head = struct.pack(">HHHHHH", ident, 0x0100, 1, 0, 0, 1)
    opt = b"\0" + struct.pack(">HHIH", 41, 4096, 0, 0)
    return ident, head + labels + b"\0" + struct.pack(">HH", SRV, 1) + opt


def ask(server, name, timeout):
    """The answer of `server`, over UDP, and over TCP if it does not fit."""
    ident, query = question(name)
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.settimeout(timeout)
        udp.connect(server)
        udp.send(query)
        answer = udp.recv(65535)
    truncated = len(answer) > 2 and answer[2] & 0x02
    if truncated:
        with socket.create_connection(server, timeout) as tcp:
            tcp.sendall(struct.pack(">H", len(query)) + query)
            (length,) = struct.unpack(">H", exactly(tcp, 2))
            answer = exactly(tcp, length)
    if len(answer) < 12 or answer[:2] != struct.pack(">H", ident):
        raise Failed(f"the answer of {server[0]} is not one to this question")
    return answer


def exactly(tcp, count):
    data = b""
    while len(data) < count:
        part = tcp.recv(count - len(data))
        if not part:
            raise Failed("the answer ended early")
        data += part
    return data


def read_name(message, at):
    """The name at `at`, which may point elsewhere (RFC 1035, 4.1.4), and where what follows it begins."""
    parts, end = [], None
    for _ in range(128):
        length = message[at]
        if length & 0xC0 == 0xC0:
            end = end or at + 2
            at = (length & 0x3F) << 8 | message[at + 1]
        elif length == 0:
            return ".".join(parts).lower(), end or at + 1
        else:
            parts.append(message[at + 1 : at + 1 + length].decode("ascii"))
            at += 1 + length
    raise Failed("a name in the answer leads back to itself")


def records(message):
    """Every record of an answer: name, type, seconds to live, and the data, names in it read."""
    questions, *counts = struct.unpack(">HHHH", message[4:12])
    at = 12
    for _ in range(questions):
        _, at = read_name(message, at)
        at += 4
    for _ in range(sum(counts)):
        name, at = read_name(message, at)
        kind, _, ttl, length = struct.unpack(">HHIH", message[at : at + 10])
        at += 10
        data = message[at : at + length]
        if kind == SRV:
            priority, weight, port = struct.unpack(">HHH", data[:6])
            target, _ = read_name(message, at + 6)
            yield name, kind, ttl, (priority, weight, port, target)
        elif kind == A and length == 4:
            yield name, kind, ttl, socket.inet_ntop(socket.AF_INET, data)
        elif kind == AAAA and length == 16:
            yield name, kind, ttl, socket.inet_ntop(socket.AF_INET6, data)
        at += length


def endpoints(message):
    """What an answer says of a service, and for how many seconds; None if there is no such name."""
    code = message[3] & 0x0F
    if code == NXDOMAIN:
        return None, 0
    if code != 0:
        raise Failed(f"the name server answers with the error {code} (RFC 1035, 4.1.1)")
    found, addresses, lives = [], {}, []
    for name, kind, ttl, data in records(message):
        if kind == SRV:
            found.append(data)
            lives.append(ttl)
        else:
            addresses.setdefault(name, []).append(data)
    result = []
    for priority, weight, port, target in sorted(found):
        # A target whose address came along needs no lookup; another is a host name, which vmesh resolves.
        for host in sorted(addresses.get(target, [target])):
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            # For SRV a weight of 0 is a small share; for vmesh it would be none.
            result.append({"address": shown, "weight": max(weight, 1), "labels": {"srv_priority": str(priority)}})
    return result, min(lives, default=0)


def look_up(options, name):
    """Asks one name server after the other."""
    failures = []
    for server in options.server:
        try:
            return endpoints(ask(server, name, options.timeout))
        except (OSError, IndexError, struct.error, UnicodeDecodeError, Failed) as failure:
            failures.append(f"{server[0]}: {failure}")
    raise Failed("; ".join(failures) or "there is no name server to ask")


def view(options):
    """All services, and when to look again."""
    services, wait = [], options.interval
    for service, name in options.service:
        found, lives = look_up(options, name)
        if found is not None:
            services.append({"service": service, "protocol": options.protocol, "endpoints": found})
        if lives:
            wait = min(wait, max(lives, 1))
    return services, wait


def say(**said):
    print(json.dumps(said), flush=True)


def heard(lines, wait):
    """The lines that vmesh writes within `wait` seconds; None when it is gone."""
    ready, _, _ = select.select([sys.stdin], [], [], wait)
    if not ready:
        return []
    data = sys.stdin.buffer.raw.read(65536)
    if not data:
        return None
    lines.append(data)
    *whole, rest = b"".join(lines).split(b"\n")
    lines[:] = [rest]
    return [json.loads(line) for line in whole if line.strip()]


def name_servers():
    servers = []
    with open("/etc/resolv.conf", encoding="ascii", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                servers.append((words[1], 53))
    return servers


def address(text):
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def pair(text):
    service, separator, name = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"`{text}`: write SERVICE=NAME, as orders=_orders._tcp.example.internal")
    return service, name


def main():
    parser = argparse.ArgumentParser(description="vmesh discovery by DNS SRV records")
    parser.add_argument("service", nargs="+", type=pair, help="SERVICE=NAME: what it is called, and where its SRV records are")
    parser.add_argument("--server", action="append", type=address, help="HOST:PORT of a name server; built in: /etc/resolv.conf")
    parser.add_argument("--protocol", default="tcp", help="what the services speak; built in: tcp")
    parser.add_argument("--interval", type=float, default=10, help="seconds between two looks at most; built in: 10")
    parser.add_argument("--timeout", type=float, default=2, help="seconds to wait for a name server; built in: 2")
    options = parser.parse_args()
    options.server = options.server or name_servers()

    lines, last, confirms = [], None, []
    while True:
        try:
            services, wait = view(options)
            for asked in confirms:
                say(type="view", services=services, confirms=asked)
            if services != last:
                say(type="view", services=services)
            elif not confirms:
                say(type="alive")
            last, confirms = services, []
        except Failed as failure:
            say(type="failed", message=str(failure))
            # Whatever comes next is news: vmesh marks what it knows as stale until then.
            wait, last, confirms = options.interval, None, []
        until = time.monotonic() + wait
        while (left := until - time.monotonic()) > 0 and not confirms:
            said = heard(lines, left)
            if said is None:
                return
            confirms += [line["id"] for line in said if line.get("type") == "confirm"]


if __name__ == "__main__":
    main()
