"""The gateway: public gRPC on one side, schedulers on the other. It keeps no state that outlives a request."""
