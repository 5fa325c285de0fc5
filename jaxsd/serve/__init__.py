"""A server for teams: A1111's API over microbatches. `app` is HTTP, `a1111` its language, `batcher`
the queue; nothing here is needed to make pictures otherwise."""
