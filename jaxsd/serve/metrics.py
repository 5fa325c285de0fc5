"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own; every method of theirs is thread-safe."""

    def __init__(self, microbatch):
        self.registry = registry = CollectorRegistry()

        def histogram(name, text, buckets):
            return Histogram(f'jaxsd_{name}', text, buckets=buckets, registry=registry)

        self.requests = Counter('jaxsd_requests', 'Requests answered.', ['route', 'status'],
                                registry=registry)
        self.outcomes = Counter(
            'jaxsd_pictures', 'Pictures: made; failed; cancelled before they were begun; unwanted: '
            'made for requests that had gone by then; shared: asked for while the same one was on '
            'its way.', ['outcome'], registry=registry)
        for outcome in ('made', 'failed', 'cancelled', 'unwanted', 'shared'):
            self.outcomes.labels(outcome)
        self.queue = Gauge('jaxsd_queue_pictures', 'Pictures that wait.', registry=registry)
        self.running = Gauge('jaxsd_running_pictures', 'Pictures being made.', registry=registry)
        self.fill = histogram('microbatch_pictures', 'Pictures in a microbatch.',
                              sorted({2**n for n in range(microbatch.bit_length())} | {microbatch}))
        self.queueing = histogram('queueing_seconds', 'From arrival to the start of a microbatch.',
                                  SECONDS)
        self.making = histogram('making_seconds', 'That a microbatch had its device.',
                                SECONDS)
        self.compiling = histogram('compiling_seconds', 'To start the first of a kind.', SECONDS)
        self.answering = histogram('request_seconds', 'From a request to its answer.', SECONDS)
