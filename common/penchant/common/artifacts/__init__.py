"""What the operator makes and devices trust: signed, content-addressed and versioned.

signing.py        envelopes; the offline root key, the release keys that it certifies, and how a device checks them
manifest.py       what a release is (a model's hash, learner, plan, guarantee), and which one a channel points to
release.py        a released model as bytes: a learner's state, and what devices score with
bundle.py         what an app ships with, so that it recommends before it ever met a server
sealing.py        a contribution that only the process which sums it can open
distribution.proto  how a device asks for all of these

docs/wire.md says the same for those who write a client in another language, with test vectors.
"""
