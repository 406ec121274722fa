"""Goals: what a person wants a model to attend to, as fields on its routers and priors of its gates."""
