"""`python -m host_harness.serve --port N`, from tests/: the host on the CPU with this pack and small model files."""

import argparse
import signal
import sys
import time

from . import inprocess, server, small_models, template_files

BASE = inprocess.ROOT / ".dev" / "base"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188, help="0 picks a free one")
    options = parser.parse_args()
    for name in ("SIGTERM", "SIGHUP"):  # so that the host ends with us; Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))
    if options.port and not server.is_free(options.port):
        print(f"Port {options.port} is in use: `python dev.py serve --port 0` picks a free one.", file=sys.stderr)
        return 1
    print("writing small models ...", flush=True)
    inprocess.register_pack()
    template_files.write(BASE)
    small_models.write_stand_ins(BASE)
    try:
        with server.ComfyServer(BASE, port=options.port or None) as running:
            for name in running.failed_imports():
                print(f"custom_nodes/{name} could not be imported: see {running.log}")
            print(f"ComfyUI: {running.url}")
            print(
                "Browse Templates > lowbit: its workflows find small stand-ins with random weights under the names they"
            )
            print(f"ask for, in {BASE / 'models'}. Set width and height to 256 for a quick run: the picture is noise.")
            print(f"log: {running.log}; Ctrl+C ends it", flush=True)
            while running.process.poll() is None:
                time.sleep(0.5)
            print(f"the host ended:\n{running.log_tail(10)}")
            return 1
    except server.HostError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
