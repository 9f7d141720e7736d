//! All tests, in one program: they share one template database and run side by side, each on a database of its own.

mod capture;
mod chaos;
mod commands;
mod contract;
mod docs;
mod failover;
mod guard;
mod input;
mod keys;
mod load;
mod migrations;
mod outage;
mod owners;
mod problems;
mod restore;
mod rollout;
mod start;
mod support;
mod truth;
mod views;
