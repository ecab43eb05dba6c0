"""Will it fit: memory and time of a training step, from a step of a few of the model's layers on tensors without values.

`inputs` says what is to be planned. `step` runs two and three layers of a configuration, writes down what is alive when, as
functions of the length, and carries that on to full depth; `devices` adds what an engine and an optimizer hold; `plan` puts
them together.
"""
