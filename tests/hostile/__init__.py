"""A hostile server against the shipped client app: more than 13,000 messages, checked from outside.

`device.Device.ask` sends one message to ``fedlora_flwr.client_app.app`` as a SuperNode's process
does, and asserts all that must hold: what the reply may hold (`allowed`), that the ledger has a row
before the first private batch and for every release, that no record was opened for a refusal, and
that nothing outside the device's folders was read, run or reached (`recorder`). Each file asserts
how many messages it has sent.
"""
