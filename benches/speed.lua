-- The requests of one row of the table, for wrk, and what became of them: requests a second, median and 99th percentile in
-- microseconds, answers with an error, answers, requests without one.

local body = '{"name": "Loft", "postal_address": {"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Paris", '
    .. '"country": "FR"}, "description": "' .. string.rep("Nice. ", 40) .. '", "building_type": "HOUSE", '
    .. '"latest_price_eur": =price=, "surface_area_m2": 42.5, "rooms_count": 2, "bedrooms_count": 1, '
    .. '"contact_phone_number": "+33123456789"}'
-- With a key where there is one.
local key = os.getenv("KEY")
local headers = { ["Content-Type"] = "application/json", ["Authorization"] = key and "Bearer " .. key }

-- The method, the path, and the numbers for the path and then for the body, anew for each request.
local rows = {
    history = { "GET", "/listings/%d/prices", function() return math.random(500000) end },
    listing = { "GET", "/listings/%d", function() return math.random(500000) end },
    hot = { "GET", "/listings/4711", function() end },
    unknown = { "GET", "/listings/%d", function() return 500000000 + math.random(500000) end },
    common = { "GET", "/listings?city=Paris&limit=100&after=%d", function() return math.random(400000) end },
    rare = { "GET", "/listings?city=Town%%20%d&limit=100", function() return math.random(600) end },
    keep = { "PUT", "/listings/%d", function() local id = math.random(400001, 500000) return id, 100000 + id end },
    reprice = { "PUT", "/listings/%d", function() return math.random(400001, 500000), math.random(1000000, 9000000) end },
    create = { "POST", "/listings", function() return math.random(1000000) end },
}

local threads = 0
function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

-- All but the numbers is put together once: a read then costs 0.1 µs to make, a write 0.4. Whole requests are not made
-- beforehand, because one thread would still be making its own while the other is measured already.
local request_with, numbers
function init(arguments)
    math.randomseed(os.time() * 100 + number)
    local method, path
    method, path, numbers = unpack(rows[arguments[1]])
    request_with = method == "GET" and wrk.format(method, path) or wrk.format(method, path, headers, body)
    -- As long as what it stands for, because the length of the body has been counted.
    request_with = request_with:gsub("=price=", "%%7d")
end

function request()
    return request_with:format(numbers())
end

function done(summary, latency)
    local errors = summary.errors
    print(("result %d %d %d %d %d %d"):format(summary.requests / summary.duration * 1e6, latency:percentile(50),
        latency:percentile(99), errors.status, summary.requests,
        errors.connect + errors.read + errors.write + errors.timeout))
end
