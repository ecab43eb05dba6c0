"""Will it fit: memory and time of a training step, from a step of a few of the model's layers on tensors without values.

`trace` runs two and three layers of a configuration and writes down what is alive when, as functions of the length;
`profile` carries that on to full depth; `engines` adds what an engine and an optimizer hold; `plan` puts them together.
"""
