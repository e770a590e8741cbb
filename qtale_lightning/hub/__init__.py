"""The Hugging Face hub: the only part of the package that talks to it.

A repository's files are downloaded at one commit and then read from their folder, so that what was declared is what is
read, and nothing that loads them asks the network again.

Nothing is imported here: the hub's clients take a second, and most runs need no hub.
"""
