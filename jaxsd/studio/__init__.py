"""A page to draw on, over the server's engine and queue. `app` has the routes, `plans` says in
files and in Python what the page asked for; nothing here is needed to make pictures otherwise."""
