"""Calls `xds:///SERVICE.mesh` with gRPC's own xDS client, and prints who answered.

usage: echo.py serve ADDRESS NAME       a server of /test.Echo/Say that answers NAME
       echo.py call TARGET COUNT        COUNT calls, one name a line; then waits for lines on stdin and calls again
"""

import sys
from concurrent import futures

import grpc


def identity(data):
    return data


def serve(address, name):
    class Echo(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method == "/test.Echo/Say":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: name.encode())
            return None

    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Echo(),))
    if server.add_insecure_port(address) == 0:
        raise SystemExit(f"could not listen on {address}")
    server.start()
    print("serving", flush=True)
    server.wait_for_termination()


def call(target, count):
    channel = grpc.insecure_channel(target)
    say = channel.unary_unary("/test.Echo/Say", request_serializer=identity, response_deserializer=identity)
    while True:
        names = {}
        for _ in range(count):
            name = say(b"", timeout=20, wait_for_ready=True).decode()
            names[name] = names.get(name, 0) + 1
        print("answered by", " ".join(sorted(names)), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3])
    else:
        call(sys.argv[2], int(sys.argv[3]))
