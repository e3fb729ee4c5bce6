"""The control plane's database: tables, migrations, named statements. SQL is spoken here and nowhere above."""
