"""The same loop with mini-sequences turned on in code, by one line: an argument of `Accelerator`.

The last argument on the command line says which: `handler` or `plugin`.
"""

import sys

from accelerator_loop import main

from ds_minis import MiniSequencePlugin

if __name__ == "__main__":
    plugin = MiniSequencePlugin(chunk_size=10, loss_chunk_size=9)
    if sys.argv.pop() == "handler":
        main(handlers=[plugin])
    else:
        main(mini_sequence_plugin=plugin)
