"""A server for teams: A1111's API over an Engine. `app` is HTTP, `a1111` its language, `queue`
the queue; nothing here is needed to make pictures otherwise."""
