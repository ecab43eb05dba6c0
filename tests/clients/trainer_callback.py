"""The same `Trainer` with mini-sequences turned on in code, by one line: a callback."""

from trainer import main

from ds_minis import MiniSequenceCallback

if __name__ == "__main__":
    main(callbacks=[MiniSequenceCallback(chunk_size=10, loss_chunk_size=9)])
