// Fastify with ioredis and pg: cache-aside, the key is deleted after COMMIT. Node's cluster runs the workers.
'use strict'

const cluster = require('node:cluster')

const { HOST, PORT, WORKERS, DATABASE_URL, REDIS_SOCKET, REDIS_PASSWORD, REDIS_DATABASE, REDIS_TTL } = process.env

const SELECT = 'SELECT id, name, email, created_at, updated_at, version FROM users WHERE id = $1'
const UPDATE = 'UPDATE users SET name = coalesce($1, name), email = coalesce($2, email) WHERE id = $3 RETURNING id'

const POOL_SIZE = 8 // of each worker, as in bench/peers/user.py

const params = {
  type: 'object',
  properties: { id: { type: 'integer', minimum: 1 } },
  required: ['id']
}

const user = {
  type: 'object',
  properties: {
    id: { type: 'integer' },
    name: { type: 'string' },
    email: { type: 'string' },
    created_at: { type: 'string' },
    updated_at: { type: 'string' },
    version: { type: 'integer' }
  }
}

const changes = {
  type: 'object',
  properties: {
    name: { type: 'string', pattern: '\\S', maxLength: 100 },
    email: { type: 'string', format: 'email' }
  },
  additionalProperties: false
}

const message = {
  type: 'object',
  properties: { message: { type: 'string' } }
}

function serve () {
  const { Pool, types } = require('pg')
  types.setTypeParser(types.builtins.INT8, Number)
  // A Date would lose the microseconds.
  types.setTypeParser(types.builtins.TIMESTAMPTZ, text => text.replace(' ', 'T') + ':00')

  const database = new Pool({ connectionString: DATABASE_URL, max: POOL_SIZE })
  // Without enableAutoPipelining, which costs a worker a tenth more CPU time for each read.
  const cache = new (require('ioredis'))({
    path: REDIS_SOCKET,
    password: REDIS_PASSWORD,
    db: Number(REDIS_DATABASE)
  })
  const app = require('fastify')({
    keepAliveTimeout: 75_000,
    ajv: { customOptions: { removeAdditional: false } }
  })

  app.get('/users/:id', { schema: { params, response: { 200: user } } }, async (request, reply) => {
    const key = `user:${request.params.id}`
    let body = await cache.get(key)
    if (body === null) {
      const { rows } = await database.query({ name: 'select', text: SELECT, values: [request.params.id] })
      if (rows.length === 0) {
        return reply.callNotFound()
      }
      body = reply.serializeInput(rows[0], '200')
      await cache.setex(key, REDIS_TTL, body)
    }
    return reply.type('application/json').send(body)
  })

  app.put('/users/:id', { schema: { params, body: changes, response: { 200: message } } }, async (request, reply) => {
    const { name = null, email = null } = request.body
    const { rows } = await database.query({
      name: 'update',
      text: UPDATE,
      values: [name && name.trim(), email, request.params.id]
    })
    if (rows.length === 0) {
      return reply.callNotFound()
    }
    await cache.del(`user:${request.params.id}`)
    return { message: 'Updated' }
  })

  app.listen({ host: HOST, port: Number(PORT), backlog: 4096 })
}

if (cluster.isPrimary) {
  for (let worker = 0; worker < Number(WORKERS); worker++) {
    cluster.fork()
  }
} else {
  serve()
}
