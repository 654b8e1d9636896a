from rabitq_jax.cli import main

main()
