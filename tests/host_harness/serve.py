"""`python -m host_harness.serve --port N`, from tests/: the host on the CPU with this pack and small model files."""

import argparse
import signal
import sys
import time

from . import inprocess, server, small_models

BASE = inprocess.ROOT / ".dev" / "base"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188, help="0 picks a free one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the host ends with us
    files = small_models.write_stand_ins(BASE)
    try:
        with server.ComfyServer(BASE, port=options.port or None) as running:
            for name in running.failed_imports():
                print(f"custom_nodes/{name} could not be imported: see {running.log}")
            print(f"ComfyUI: {running.url}")
            print(f"small models: {', '.join(files.values())} in {BASE / 'models'}")
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
